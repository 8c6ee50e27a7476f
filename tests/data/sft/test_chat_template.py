"""Chat templates: the text that transformers renders, and no harm from a hostile one."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tokenizers

from entrenar.data import Tokenizer
from entrenar.data.sft import chat_worker
from entrenar.data.sft.chat_template import ChatTemplate, TemplateStoppedError
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
SLOW = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
SCRIPTS = Path(chat_worker.__file__).parent
CONTROL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
DECODER = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def small_tokenizer(template: str | None) -> Tokenizer:
    model = {"type": "BPE", "vocab": {"<s>": 0, "</s>": 1, "<unk>": 2, "a": 3}, "merges": []}
    added = [{"id": i, "content": name, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False} for i, name in enumerate(("<s>", "</s>", "<unk>"))]  # fmt: skip
    content = {"version": "1.0", "model": model, "added_tokens": added, "decoder": DECODER}
    return Tokenizer(content, CONTROL if template is None else {**CONTROL, "chat_template": template})


def worker_of(chat: ChatTemplate) -> subprocess.Popen[bytes]:
    """Return the process that renders, for tests of how it ends."""
    return chat._processes["default"]._worker


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
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    with ChatTemplate(Tokenizer.load(folder)) as chat:
        ids = chat.encode(TALK, add_generation_prompt=True)
    assert ids == theirs.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)


HOSTILE = {
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "unsafe|SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{{ cycler.__init__.__globals__ }}": "unsafe|SecurityError|UndefinedError",
    "{{ 'a' * 10**10 }}": "memory",
    "{{ '%9999999999d' % 1 }}": "memory|Error",
    GROWING: "memory|longer|more than 1 s of CPU",
    "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}": r"longer than 4000000 characters$",
    SLOW: r"more than 1 s of CPU time for one text",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}": "recursion|more than 1 s of CPU",
    "{{ 10 ** (10 ** 10) }}": "more than 1 s of CPU|memory",
    "{% for x in %}": "TemplateSyntaxError: ",
    "{% break %}": "SyntaxError: 'break' outside loop",
    "{% include '/etc/passwd' %}": r"(TypeError|TemplateNotFound|TemplatesNotFound): ",
    "{{ raise_exception('no system role') }}": r"TemplateError: no system role$",
    "{{ undefined_thing.x }}": r"UndefinedError",
    "{{ 1 / 0 }}": r"ZeroDivisionError",
}


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_does_no_harm(template):
    """It ends in a typed error, and so does the next question."""
    with ChatTemplate(small_tokenizer(template), cpu_s=1) as chat:
        for _ in range(2):
            with pytest.raises(FormatError, match=f"chat_template.*({HOSTILE[template]})"):
                chat.render(TALK)


def test_only_cpu_time_counts():
    """A template that waits for the processor for longer than its limit is still rendered."""
    with ChatTemplate(small_tokenizer(CHATML), cpu_s=0.2) as chat:
        first = chat.render(TALK)
        os.kill(worker_of(chat).pid, signal.SIGSTOP)
        threading.Timer(0.5, os.kill, (worker_of(chat).pid, signal.SIGCONT)).start()
        assert chat.render(TALK) == first


@pytest.mark.parametrize("template", ["{{ 7 ** 1500000000 }}", SLOW])
def test_a_long_row_for_a_template_that_never_reads_it_ends(template):
    """jinja2 computes constants while it compiles, so the pipe to the process is full and nobody empties it."""
    with ChatTemplate(small_tokenizer(template), cpu_s=0.5) as chat:
        for _ in range(2):
            with pytest.raises(TemplateStoppedError, match=r"more than 0\.5 s of CPU time|memory"):
                chat.render([{"role": "user", "content": "a" * 5_000_000}])


def test_a_process_that_was_killed_is_started_again():
    """Linux kills it with the thread that started it; the next thread needs a new one."""
    with ChatTemplate(small_tokenizer(CHATML)) as chat:
        thread = threading.Thread(target=chat.render, args=(TALK,))
        thread.start()
        thread.join()
        worker_of(chat).kill()
        worker_of(chat).wait()
        assert "Be brief." in chat.render(TALK)


PARENT = """
import sys, threading, time
from pathlib import Path
from entrenar.data import Tokenizer
from entrenar.data.sft.chat_template import ChatTemplate
chat = ChatTemplate(Tokenizer.load(Path(sys.argv[1])), cpu_s=3600)
chat.render([])
print(chat._processes["default"]._worker.pid, flush=True)
chat.render([{"role": "user", "content": "spin"}])
"""


def test_the_process_ends_when_its_parent_is_killed(tmp_path):
    """Even while it spins inside a template."""
    small_tokenizer("{% if messages %}" + SLOW + "{% endif %}").save(tmp_path)
    command = [sys.executable, "-c", PARENT, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        worker = int(parent.stdout.readline())
        assert _runs(worker)
        parent.kill()
    for _ in range(600):
        if not _runs(worker):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the process outlived its parent")


def _runs(pid: int) -> bool:
    """Return whether a process exists and is more than a zombie that nobody has waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


def test_without_linux_a_closed_pipe_ends_the_process():
    """The thread that waits for it needs no line to arrive."""
    code = "import chat_worker; chat_worker._exit_at_hang_up()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, cwd=SCRIPTS) as waiting:
        waiting.stdin.write(b"a line that nobody reads\n")
        waiting.stdin.flush()
        assert waiting.poll() is None
        waiting.stdin.close()
        assert waiting.wait() == 1


def test_a_parent_that_is_already_gone_ends_the_process():
    """It may end before the kernel knows that its child should end with it."""
    code = "import chat_worker; chat_worker.die_with_parent(-1)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, check=False).returncode == 1


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
    with ChatTemplate(small_tokenizer("{{ tools | tojson }}{{ x }}")) as chat:
        assert chat.render([], tools=[{"name": "f"}], x=1) == '[{"name": "f"}]1'


WITH_REASONING = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "reasoning": "b"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
SURROUNDINGS = {
    "{{ tools is none }} {{ documents is none }}": (TALK, None),
    "{{ tools is defined }} {{ tools | tojson }}": (TALK, TOOLS),
    "{{ unk_token }} {{ bos_token }} {{ pad_token is defined }}": (TALK, None),
    "{{ strftime_now('%Y') | length }}": (TALK, None),
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}": (TALK, None),
    "{% for m in messages %}{{ m.keys() | list }}{% endfor %}": (WITH_REASONING, None),
    "{{ messages[-1].reasoning_content }} {{ messages[-1].thinking }}": (WITH_REASONING, None),
    "{{ messages | tojson(indent=2) }}": (WITH_REASONING, None),
}


@pytest.mark.parametrize("template", SURROUNDINGS)
def test_a_template_finds_what_transformers_gives_it(template):
    """Tools, documents, special tokens, the clock, generation blocks, and messages without empty keys."""
    transformers = pytest.importorskip("transformers")
    tokenizer = small_tokenizer(template)
    backend = tokenizers.Tokenizer.from_str(json.dumps(dict(tokenizer.content)))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **CONTROL)
    messages, tools = SURROUNDINGS[template]
    expected = theirs.apply_chat_template(messages, tools=tools, chat_template=template, tokenize=False)
    with ChatTemplate(tokenizer) as chat:
        assert chat.render(messages, tools=tools) == expected


def test_the_clock_can_stand_still():
    """A run that is resumed on another day reads the rows it began with."""
    template = "{{ strftime_now('%d %b %Y %H') }}"
    with ChatTemplate(small_tokenizer(template), today="2024-07-26") as chat:
        assert chat.render(TALK) == "26 Jul 2024 00"


def test_generation_blocks_are_found_where_they_stand():
    """Each block's span holds its text, in every rendering."""
    template = "{% for m in messages %}<{% generation %}{{ m.content }}{% endgeneration %}>{% endfor %}"
    with ChatTemplate(small_tokenizer(template)) as chat:
        for _ in range(2):
            found = chat.rendering(TALK)
            assert [found.text[start:end] for start, end in found.generated] == [m["content"] for m in TALK]


NAMED = {"default": "D{{ messages | length }}", "tool_use": "T{{ tools | length }}"}


@pytest.mark.parametrize("form", [NAMED, [{"name": name, "template": text} for name, text in NAMED.items()]])
def test_the_template_for_tools_is_taken_where_there_are_tools(form):
    """Of several templates, by transformers' rule; both spellings of several."""
    with ChatTemplate(Tokenizer(dict(small_tokenizer(None).content), {**CONTROL, "chat_template": form})) as chat:
        assert chat.render(TALK) == "D4"
        assert chat.render(TALK, tools=TOOLS) == "T1"
        assert chat.render(TALK) == "D4"


def test_several_templates_without_a_default_are_refused_by_name():
    """A message names those that there are."""
    form = {"rag": "x", "tool_use": "y"}
    with ChatTemplate(Tokenizer(dict(small_tokenizer(None).content), {**CONTROL, "chat_template": form})) as chat:
        assert chat.render(TALK, tools=TOOLS) == "y"
        with pytest.raises(DataError, match=r"must have a chat template named 'default', got rag, tool_use; rename"):
            chat.render(TALK)


def test_tools_and_calls_cannot_forge_a_turn():
    """Control tokens are looked for in every text of a message, and in the tools."""
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": ["</s>"]}}}]}
    with ChatTemplate(small_tokenizer(CHATML)) as chat:
        with pytest.raises(DataError, match="message 0 spells the control token"):
            chat.encode([call])
        with pytest.raises(DataError, match="the list of tools spells the control token '<s>'"):
            chat.encode([{"role": "user", "content": "a"}], tools=[{"name": "<s>"}])
