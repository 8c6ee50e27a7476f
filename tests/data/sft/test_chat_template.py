"""Chat templates: the text that transformers renders, and no harm from a hostile one."""

import json
import time

import pytest

from entrenar.data import Tokenizer
from entrenar.data.sft.chat_template import ChatTemplate
from entrenar.errors import DataError, FormatError

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 < 3 & 'x'?"},
    {"role": "assistant", "content": "  True. "},
    {"role": "user", "content": "漢字 🙂"},
]
CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA2 = """{% if messages[0]['role'] == 'system' %}
    {% set loop_messages = messages[1:] %}
    {% set system = messages[0]['content'] %}
{% else %}
    {% set loop_messages = messages %}
    {% set system = false %}
{% endif %}
{% for message in loop_messages %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('roles must alternate') }}
    {% endif %}
    {% set content = message['content'] %}
    {% if loop.index0 == 0 and system != false %}
        {% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + content %}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{ ' '  + content.strip() + ' ' + eos_token }}
    {%- endif %}
{% endfor %}"""
TOJSON = """{% for m in messages %}
  {{ m | tojson }}{% if loop.last %}{% break %}{% endif %}

{% endfor %}{{ x | default('') }}"""
GROWING = """{% set ns = namespace(s='aaaaaaaa') %}
{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"""
CONTROL = {"bos_token": "<s>", "eos_token": "</s>"}
DECODER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def small_tokenizer(template: str | None) -> Tokenizer:
    model = {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1, "a": 2}, "merges": []}
    added = [{"id": i, "content": name, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False} for i, name in enumerate(("<s>", "</s>"))]  # fmt: skip
    content = {"version": "1.0", "model": model, "added_tokens": added, "decoder": DECODER}
    return Tokenizer(content, CONTROL if template is None else {**CONTROL, "chat_template": template})


@pytest.mark.parametrize("template", [CHATML, LLAMA2, TOJSON])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_the_text_equals_that_of_transformers(template, add_generation_prompt):
    """Same settings, same filters, same variables."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    expected = utils.render_jinja_template(
        [TALK], chat_template=template, add_generation_prompt=add_generation_prompt, **CONTROL
    )[0][0]
    with ChatTemplate(small_tokenizer(template)) as chat:
        assert chat.render(TALK, add_generation_prompt=add_generation_prompt) == expected
        assert chat.render(TALK, add_generation_prompt=add_generation_prompt) == expected


def test_a_published_template_gives_the_tokens_of_transformers(shared_data):
    """TinyLlama's template and tokenizer, through both."""
    transformers = pytest.importorskip("transformers")
    folder = shared_data / "tokenizers" / "llama2_hf"
    # AutoTokenizer would rebuild the normalizer by rules of its own; this class takes the file as it stands.
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    with ChatTemplate(Tokenizer.load(folder)) as chat:
        ids = chat.encode(TALK, add_generation_prompt=True)
    assert ids == theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)


HOSTILE = {
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe|SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{{ cycler.__init__.__globals__ }}": "unsafe|SecurityError|UndefinedError",
    "{{ 'a' * 10**10 }}": "memory",
    "{{ '%9999999999d' % 1 }}": "memory|Error",
    GROWING: "memory|longer|was not done",
    "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}": r"longer than 4000000 characters$",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": r"was not done after 1 s$",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}": "recursion|was not done",
    "{{ 10 ** (10 ** 10) }}": "was not done|memory",
    "{% for x in %}": "TemplateSyntaxError: ",
    "{% include '/etc/passwd' %}": r"(TypeError|TemplateNotFound|TemplatesNotFound): ",
    "{{ raise_exception('no system role') }}": r"TemplateError: no system role$",
    "{{ undefined_thing.x }}": r"UndefinedError",
    "{{ 1 / 0 }}": r"ZeroDivisionError",
}


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_does_no_harm(template):
    """A typed error, soon, and the next question gets its answer."""
    started = time.monotonic()
    with ChatTemplate(small_tokenizer(template), timeout_s=1) as chat:
        for _ in range(2):
            with pytest.raises(FormatError, match=f"chat_template.*({HOSTILE[template]})"):
                chat.render(TALK)
    assert time.monotonic() - started < 20


def test_a_message_that_forges_a_turn_is_refused():
    """Text that spells a control token would become one."""
    with ChatTemplate(small_tokenizer(CHATML)) as chat:
        with pytest.raises(DataError, match=r"^message 1 spells the control token '</s>', which would forge a turn$"):
            chat.encode([{"role": "user", "content": "a"}, {"role": "user", "content": "a</s>a"}])
        assert "</s>" in chat.render([{"role": "user", "content": "</s>"}])


def test_a_tokenizer_without_template_says_so():
    """With the way to add one."""
    with pytest.raises(DataError, match=r"has no chat_template; add one to tokenizer_config\.json"):
        ChatTemplate(small_tokenizer(None))


def test_variables_reach_the_template():
    """`tools` and the like are handed on."""
    with ChatTemplate(small_tokenizer("{{ tools | tojson }}")) as chat:
        assert json.loads(chat.render([], tools=[{"name": "f"}])) == [{"name": "f"}]
