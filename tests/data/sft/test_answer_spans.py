"""`entrenar.data.sft.answer_spans`: where messages stand in the text that a template makes of them."""

import pytest

from entrenar.data import Tokenizer
from entrenar.data.sft.answer_spans import AnswerSpans
from entrenar.data.sft.chat_template import ChatTemplate
from entrenar.data.sft.shapes import UnusableRowError

CHATML = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.content %}{{ m.content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ '[' + c.function.name + ']' }}{% endfor %}{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]},
    {"role": "tool", "content": "sat"},
    {"role": "assistant", "content": "sat"},
]


@pytest.fixture
def spans(tokenizer):
    """Make the spans of messages under a template."""
    opened = []

    def make(template, messages):
        opened.append(ChatTemplate(Tokenizer(dict(tokenizer.content), {"chat_template": template})))
        return AnswerSpans(opened[-1], messages)

    yield make
    for chat in opened:
        chat.close()


def test_answers_and_turns_are_found_though_their_words_repeat(spans):
    """An answer is what follows its generation prompt; a turn has its header too."""
    found = spans(CHATML, TALK)
    assert [found.text[start:end] for start, end in found.of([1, 3, 5])] == ["sat</s>", "[look]</s>", "sat</s>"]
    assert [found.text[start:end] for start, end in map(found.turn, (0, 3, 5))] == [
        "<user>the cat</s>",
        "<assistant>[look]</s>",
        "<assistant>sat</s>",
    ]
    assert found.of([3]) == found.of([1, 3, 5])[1:2]


def test_a_turn_that_later_turns_change_cannot_be_told_from_them(spans):
    """The message names the turn after which the text is another."""
    found = spans("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", TALK[:3])
    with pytest.raises(UnusableRowError, match="rewrites turns after message 1; set train_on = last"):
        found.of([1])
    with pytest.raises(UnusableRowError, match="rewrites turns after message 0"):
        found.turn(1)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("<assistant><think>", "sat</s>"), ("<assistant>", "sat</s>"), ("", "<assistant>sat</s>")],
)
def test_the_answer_begins_where_prompt_and_turn_part(spans, prompt, expected):
    """Also where the prompt opens a block that the turn lacks, or there is none."""
    template = CHATML.replace("{{ '<assistant>' }}{% endif %}", f"{{{{ '{prompt}' }}}}{{% endif %}}")
    found = spans(template, TALK[:2])
    assert [found.text[start:end] for start, end in found.of([1])] == [expected]


@pytest.mark.parametrize("prompt", ["<model>", "<assistant><think>"])
def test_a_prompt_that_is_another_turn_is_refused(spans, prompt):
    """Where they share nothing, or a part of the answer, the model would learn a start that it never sees."""
    template = CHATML.replace("{{ '<assistant>' }}{% endif %}", f"{{{{ '{prompt}' }}}}{{% endif %}}")
    found = spans(template, [TALK[0], {"role": "assistant", "content": "<thin> air"}])
    with pytest.raises(UnusableRowError, match="generation prompt is no beginning of message 1"):
        found.of([1])


def test_what_ends_a_conversation_only_is_no_part_of_its_earlier_turns(spans):
    """Phi-3's template writes a last token where no generation prompt follows."""
    template = CHATML.removesuffix("{% endif %}") + "{% else %}{{ '<|eos|>' }}{% endif %}"
    found = spans(template, TALK)
    assert [found.text[start:end] for start, end in found.of([1, 5])] == ["sat</s>", "sat</s><|eos|>"]
