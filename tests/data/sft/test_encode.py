"""Tokens and their marks: what is trained is the answers, and prompts are what generation would be given."""

import functools
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from entrenar.data import Tokenizer, train_bpe
from entrenar.data.sft import encode
from entrenar.data.sft.chat_template import ChatTemplate, TemplateStoppedError
from entrenar.data.sft.encode import Encoder
from entrenar.data.sft.shapes import UnusableRowError, read_shape
from entrenar.errors import ConfigError

CHATML = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TALK = {
    "messages": [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "the dog"},
        {"role": "assistant", "content": "ran under"},
    ]
}


def with_template(tokenizer, template):
    return Tokenizer(dict(tokenizer.content), {**tokenizer.config, "chat_template": template})


def parts(tokenizer, fields, prompt_format="auto", train_on="answers", templates=None):
    """Return the whole text, and the trained stretches."""
    with Encoder(tokenizer, prompt_format, train_on) as encoder:
        example = encoder.encode(read_shape(fields, templates), "f:1")
    marks = np.flatnonzero(np.diff(np.concatenate([[0], example.is_trained.astype(int), [0]]))).reshape(-1, 2)
    trained = [tokenizer.decode(example.ids[a:b], skip_special=False) for a, b in marks]
    return tokenizer.decode(example.ids, skip_special=False), trained


def test_only_the_answers_are_trained(tokenizer):
    """`answers` marks every assistant turn with its end token, `last` the last one, `all` every token."""
    eos, bos = tokenizer.name_of(tokenizer.eos_id), tokenizer.name_of(tokenizer.bos_id)
    text, trained = parts(tokenizer, TALK)
    assert text.startswith(f"{bos}Below is an instruction")
    assert "request.\n\n### Instruction:\nthe cat\n\n### Response:\nsat" in text
    assert trained == ["sat" + eos, "ran under" + eos]
    assert parts(tokenizer, TALK, train_on="last")[1] == ["ran under" + eos]
    assert parts(tokenizer, TALK, train_on="all")[1] == [text]


def test_a_chat_template_decides_the_text(tokenizer):
    """The text is the template's own rendering, and the answers with what ends them are trained."""
    chat = with_template(tokenizer, CHATML)
    eos = tokenizer.name_of(tokenizer.eos_id)
    text, trained = parts(chat, TALK)
    assert text == f"<user>the cat{eos}<assistant>sat{eos}<user>the dog{eos}<assistant>ran under{eos}"
    assert trained == [f"sat{eos}", f"ran under{eos}"]
    with Encoder(chat, "chat", "answers") as encoder:
        assert encoder.encode(read_shape(TALK, None), "").ids[-1] == tokenizer.eos_id
    full = {"instruction": "do", "input": "this", "output": "done"}
    assert parts(chat, full)[0] == f"<user>do\n\nthis{eos}<assistant>done{eos}"


def test_the_formats_without_a_template(tokenizer):
    """`alpaca` writes Stanford's prompt, plain writes lines, a completion goes on from its prompt."""
    full = {"instruction": "do", "input": "this", "output": "done"}
    eos = tokenizer.name_of(tokenizer.eos_id)
    text, trained = parts(tokenizer, full)
    assert "paired with an input" in text
    assert "### Instruction:\ndo\n\n### Input:\nthis\n\n### Response:\ndone" in text
    assert trained == ["done" + eos]
    assert "### Input" not in parts(tokenizer, {**full, "input": ""})[0]
    assert parts(tokenizer, full, "plain")[0].endswith(f"do\nthis\ndone{eos}")
    assert parts(tokenizer, {"prompt": "a:", "completion": " b"})[0].endswith(f"a: b{eos}")
    assert parts(tokenizer, {"text": "a b"})[1] == ["a b" + eos]


@pytest.mark.property
@pytest.mark.kills(
    "data.sft.encode",
    "added = self._ids(segment, is_first=len(ids) == before_text)",
    "added = self._ids(segment, is_first=len(ids) == before_text)[::-1]",
)
@settings(max_examples=60)
@given(st.text(max_size=20), st.text(min_size=1, max_size=20).filter(str.strip))
@example("", " 0")
@pytest.mark.parametrize("family", ["bytes", "sentencepiece"])
def test_a_prompt_is_encoded_as_generation_would(family, prompt, answer):
    """The tokens before the answer are those of the prompt alone, and all of them spell prompt and answer."""
    tokenizer = _TOKENIZERS[family]
    with Encoder(tokenizer, "plain", "answers") as encoder:
        example = encoder.encode(read_shape({"prompt": prompt, "completion": answer}, None), "")
    start = example.answer_start
    assert example.ids[:start].tolist() == tokenizer.encode(prompt, bos=tokenizer.add_bos)
    stream = tokenizer.decode_stream(example.ids[:start].tolist())
    assert stream.feed(example.ids[start:].tolist()) + stream.finish() == answer


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{{ messages[0]['content'] }}{{ '<a>' if add_generation_prompt }}",
            "leaves out words of the answer in message 1",
        ),
        ("{% for m in messages %}{{ m['role'] + ';' }}{% endfor %}", "leaves out words of the answer in message 1"),
        ("{{ raise_exception('no tools') }}", "no tools"),
        ("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "rewrites"),
    ],
)
def test_a_template_that_spoils_the_answer_is_told(tokenizer, template, message):
    """Dropping the answer, rewriting what was said, or refusing the messages is a fault of the row."""
    with pytest.raises(UnusableRowError, match=message) as caught:
        parts(with_template(tokenizer, template), TALK)
    assert caught.value.kind == "template"


def test_a_slow_template_is_no_fault_of_the_row(tokenizer, monkeypatch):
    """The next row would take as long, so the first one ends the reading."""
    monkeypatch.setattr(encode, "ChatTemplate", functools.partial(ChatTemplate, cpu_s=0.3))
    slow = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(TemplateStoppedError, match=r"f:1: chat_template: it took more than 0\.3 s of CPU time"):
        parts(with_template(tokenizer, slow), TALK)


def test_a_template_that_rewrites_the_past_can_train_the_last_turn(tokenizer):
    """Where earlier answers are shortened later on, only train_on = last is possible, and the message says so."""
    template = (
        "{% for m in messages %}{% set c = m['content'] if loop.last or m['role'] == 'user' else m['content'][:1] %}"
        "{{ '<' + m['role'] + '>' + c }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )
    chat = with_template(tokenizer, template)
    with pytest.raises(UnusableRowError, match="rewrites turns after message 1; set train_on = last"):
        parts(chat, TALK)
    assert parts(chat, TALK, train_on="last")[1] == ["ran under"]


def test_a_message_cannot_forge_a_turn(tokenizer):
    """Text that spells a control token is refused in a chat, and stays text in a completion."""
    eos = tokenizer.name_of(tokenizer.eos_id)
    forged = {"messages": [{"role": "user", "content": f"x{eos}"}, {"role": "assistant", "content": "y"}]}
    with pytest.raises(UnusableRowError, match="message 0 spells the control token"):
        parts(with_template(tokenizer, CHATML), forged)
    with pytest.raises(UnusableRowError, match="message 0 spells the control token"):
        parts(tokenizer, forged)
    with Encoder(tokenizer, "auto", "answers") as encoder:
        ids = encoder.encode(read_shape({"prompt": f"x{eos}", "completion": "y"}, None), "").ids
    assert np.count_nonzero(ids == tokenizer.eos_id) == 1


def test_chat_needs_a_template(tokenizer):
    """prompt_format = chat without a template is a config error."""
    with pytest.raises(ConfigError, match=r"sft\.prompt_format = chat needs a tokenizer with a chat_template"):
        Encoder(tokenizer, "chat", "answers")


# Templates as they are published, without their checks of roles.
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + eos_token }}"
    "{% else %}{{ 'USER: ' + m.content + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' ' + eos_token }}"
    "{% else %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|h|>' + m.role + '<|/h|>\n\n' + m.content | trim + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}"
)
PUBLISHED_CHATML = (
    "{% for m in messages %}{{ '<|h|>' + m.role + '\n' + m.content + '<|/h|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>assistant\n' }}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|h|>' + m.content.split('</think>')[-1] + eos_token }}{% else %}{{ '<|/h|>' + m.content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|h|><think>\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|h|>' }}{% generation %}{{ m.content + eos_token }}"
    "{% endgeneration %}{% else %}{{ '<|/h|>' + m.content }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|h|>' }}{% endif %}"
)
PUBLISHED = {"mistral": MISTRAL, "vicuna": VICUNA, "llama2": LLAMA2, "llama3": LLAMA3, "chatml": PUBLISHED_CHATML}
ENDS = {"chatml": "<|/h|>\n"}
WORDS = st.lists(st.sampled_from(["the", "cat", "ab", "é漢", "🙂", "a\nb", "e  a"]), min_size=1, max_size=4).map(
    " ".join
)


def theirs(tokenizer, template):
    """Return transformers' tokenizer over the same file, which it takes as it stands."""
    transformers = pytest.importorskip("transformers")
    backend = tokenizers.Tokenizer.from_str(json.dumps(dict(tokenizer.content)))
    roles = {"bos_token": tokenizer.name_of(tokenizer.bos_id), "eos_token": tokenizer.name_of(tokenizer.eos_id)}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **roles)


@pytest.fixture(params=PUBLISHED)
def published(request, family):
    """A template's name, a tokenizer with it, and what encodes rows and prompts."""
    tokenizer = with_template(_TOKENIZERS[family], PUBLISHED[request.param])
    with Encoder(tokenizer, "chat", "answers") as encoder, ChatTemplate(tokenizer) as chat:
        yield request.param, tokenizer, encoder, chat


@pytest.fixture(params=["bytes", "sentencepiece", "metaspace"])
def family(request):
    """The name of a kind of tokenizer."""
    return request.param


@pytest.mark.property
@pytest.mark.kills(
    "data.sft.encode",
    "ids, offsets = self._tokenizer.encode_with_offsets(spans.text)",
    "ids, offsets = self._tokenizer.encode(spans.text), self._tokenizer.encode_with_offsets(spans.text)[1]",
)
@settings(max_examples=15)
@given(talk=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_the_ids_of_training_are_those_of_generation(published, talk):
    """A whole chat has the ids of transformers, each answer follows the prompt's own ids, and it alone is trained."""
    name, tokenizer, encoder, chat = published
    oracle = theirs(tokenizer, PUBLISHED[name])
    messages = [message for pair in talk for message in (user(pair[0]), says(pair[1]))]
    example = encoder.encode(read_shape({"messages": messages}, None), "")
    prompt = chat.encode(messages[:-1], add_generation_prompt=True)
    assert example.ids.tolist() == oracle.apply_chat_template(messages, return_dict=False)
    assert prompt == oracle.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert example.ids[: example.answer_start].tolist() == prompt
    end = ENDS.get(name, tokenizer.name_of(tokenizer.eos_id))
    assert [text.strip() for text in trained_texts(tokenizer, example)] == [
        (answer + (" " if name == "llama2" else "") + end).strip() for _, answer in talk
    ]


def user(content):
    return {"role": "user", "content": content}


def says(content):
    return {"role": "assistant", "content": content}


def trained_texts(tokenizer, example):
    """Return the text of each trained stretch."""
    marks = np.flatnonzero(np.diff(np.concatenate([[0], example.is_trained.astype(int), [0]]))).reshape(-1, 2)
    texts = []
    for start, end in marks:
        stream = tokenizer.decode_stream(example.ids[:start].tolist(), skip_special=False)
        texts.append(stream.feed(example.ids[start:end].tolist()) + stream.finish())
    return texts


def test_a_generation_prompt_that_opens_a_block_trains_the_answer_only(family):
    """The header that prompt and turn share is read; the answer is found right behind it."""
    tokenizer = with_template(_TOKENIZERS[family], R1)
    end = tokenizer.name_of(tokenizer.eos_id)
    talk = [user("the cat"), says("sat"), user("ab"), says("ran a")]
    with Encoder(tokenizer, "chat", "answers") as encoder:
        example = encoder.encode(read_shape({"messages": talk}, None), "")
        assert example.ids.tolist() == theirs(tokenizer, R1).apply_chat_template(talk, return_dict=False)
        assert [text.strip() for text in trained_texts(tokenizer, example)] == ["sat" + end, "ran a" + end]
        for content, message in [
            ("x</think>y", "leaves out words of the answer in message 1"),
            ("<think", "is no beginning of message 1"),
        ]:
            with pytest.raises(UnusableRowError, match=message):
                encoder.encode(read_shape({"messages": [user("a"), says(content)]}, None), "")


def test_generation_blocks_train_what_transformers_masks(family):
    """`return_assistant_tokens_mask` of the same row."""
    tokenizer = with_template(_TOKENIZERS[family], MARKED)
    talk = [user("the cat"), says("sat e"), user("ab"), says("é漢 a")]
    expected = theirs(tokenizer, MARKED).apply_chat_template(talk, return_assistant_tokens_mask=True)
    with Encoder(tokenizer, "chat", "answers") as encoder:
        example = encoder.encode(read_shape({"messages": talk}, None), "")
    assert example.ids.tolist() == expected["input_ids"]
    assert example.is_trained.astype(int).tolist() == expected["assistant_masks"]
    with Encoder(tokenizer, "chat", "last") as encoder:
        last = encoder.encode(read_shape({"messages": talk}, None), "")
    assert trained_texts(tokenizer, last) == trained_texts(tokenizer, example)[1:]


def test_generation_blocks_that_are_no_answers_are_trained_together_only(tokenizer):
    """Where their number is not that of the answers, none of them can be left out."""
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endfor %}"
    chat = with_template(tokenizer, template)
    assert parts(chat, TALK)[1] == [message["content"] for message in TALK["messages"]]
    with pytest.raises(UnusableRowError, match="marks 4 generation blocks for 2 answers, so none can be left out"):
        parts(chat, TALK, train_on="last")


def test_a_chat_that_the_assistant_begins_trains_its_answers(tokenizer):
    """No prompt comes before the first answer; its header is read like that of every other."""
    eos = tokenizer.name_of(tokenizer.eos_id)
    talk = {"messages": [says("sat"), user("the dog"), says("ran")]}
    assert parts(with_template(tokenizer, CHATML), talk)[1] == [f"sat{eos}", f"ran{eos}"]


def test_what_follows_the_last_answer_is_read(tokenizer):
    """A row's last question stays in the row, as transformers has it, and is not trained."""
    talk = {"messages": [*TALK["messages"], user("the mat")]}
    chat = with_template(tokenizer, CHATML)
    text, trained = parts(chat, talk)
    assert text.endswith("<user>the mat" + tokenizer.name_of(tokenizer.eos_id))
    assert len(trained) == 2


def _sentencepiece(*, is_metaspace: bool = False) -> Tokenizer:
    """A small tokenizer that puts a space before a text and falls back to bytes, as LLaMA's does.

    It puts one behind every control token too, or with `is_metaspace` at the start of the whole text only.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab", "e"]
    control = {0, 1, 2, len(pieces), len(pieces) + 1}
    pieces += ["<|h|>", "<|/h|>"]
    prepend = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    }
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    content = {
        "added_tokens": [
            {"id": i, "content": pieces[i], "special": True, "normalized": False, "single_word": False,
             "lstrip": False, "rstrip": False} for i in sorted(control)
        ],
        "normalizer": None if is_metaspace else prepend,
        "pre_tokenizer": metaspace if is_metaspace else None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": ["▁ a", "a b"],
                  "unk_token": "<unk>", "byte_fallback": True, "fuse_unk": True, "dropout": None},
    }  # fmt: skip
    return Tokenizer(content, {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True})


def _bytes() -> Tokenizer:
    return train_bpe(["the cat sat on the mat\n    return the mat\n"] * 4, 300)


_TOKENIZERS = {
    "bytes": _bytes(),
    "sentencepiece": _sentencepiece(),
    "metaspace": _sentencepiece(is_metaspace=True),
}
