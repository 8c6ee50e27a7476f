"""The usual shapes of rows, and the faults of those that have none."""

import pytest

from entrenar.data.sft.prompt_template import PromptTemplate
from entrenar.data.sft.shapes import read_shape
from entrenar.data.sft.turns import Turn, UnusableRowError


def turns(fields, templates=None):
    templates = templates and tuple(map(PromptTemplate, templates))
    return [(turn.role, turn.content) for turn in read_shape(fields, templates).turns]


def test_every_usual_shape_is_read():
    """messages, ShareGPT, instruction, completion, text and own templates become turns."""
    talk = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    assert turns({"messages": talk}) == [("system", "s"), ("user", "u"), ("assistant", "a")]
    shared = {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}
    assert turns(shared) == [("user", "u"), ("assistant", "a")]
    full = {"instruction": "do", "input": "this", "output": "done"}
    assert turns(full) == [("user", "do"), ("input", "this"), ("assistant", "done")]
    assert turns({**full, "input": " "}) == turns({**full, "input": None}) == [("user", "do"), ("assistant", "done")]
    assert turns({"prompt": "p", "completion": "c"}) == [("user", "p"), ("assistant", "c")]
    assert turns({"text": "t"}) == [("assistant", "t")]
    row = {"question": "1+1", "answer": 2}
    assert turns(row, ("Q: {question} A:", " {answer}")) == [("user", "Q: 1+1 A:"), ("assistant", " 2")]


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"question": "q"}, "shape", "no known shape: .* The row has question; give prompt_template"),
        ({}, "shape", "The row has no field"),
        ({"messages": []}, "shape", "messages must be a list of messages"),
        ({"messages": "hi"}, "shape", "messages must be a list of messages"),
        ({"messages": ["hi"]}, "shape", r"messages\[0\] must be an object with role and content"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role", r"messages\[0\]: role must be one of system"),
        ({"messages": [{"content": "x"}]}, "role", "got None"),
        (
            {"messages": [{"role": "user", "content": 3}]},
            "shape",
            r"messages\[0\]: content must be text or a list of text",
        ),
        ({"messages": [{"role": "user", "content": "x"}]}, "masked", "no message of the assistant"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "empty_answer", r"messages\[0\] is empty"),
        ({"instruction": "x", "output": "\n"}, "empty_answer", "output is empty"),
        ({"instruction": 1, "output": "x"}, "shape", "instruction must be text, got int"),
        ({"prompt": "x", "completion": ""}, "empty_answer", "completion is empty"),
        ({"text": "a\ud800"}, "broken", "text holds a lone surrogate at position 1"),
    ],
)
def test_a_row_of_no_use_says_why(fields, kind, message):
    """The fault has a kind to count by and a reason to mend it by."""
    with pytest.raises(UnusableRowError, match=message) as caught:
        read_shape(fields, None)
    assert caught.value.kind == kind


def test_a_late_system_message_and_a_missing_field_are_faults():
    """A system message must be the first; a template's field must be in the row."""
    talk = [{"role": "user", "content": "u"}, {"role": "system", "content": "s"}]
    with pytest.raises(UnusableRowError, match=r"messages\[1\]: a system message must be the first"):
        read_shape({"messages": talk}, None)
    with pytest.raises(UnusableRowError, match="no field 'b' for the template; the row has a"):
        read_shape({"a": 1}, (PromptTemplate("{a}{b}"), PromptTemplate("x")))


def test_a_field_is_put_in_as_it_is():
    """A value with braces is text, not a template."""
    assert read_shape({"a": "{b}"}, (PromptTemplate("{a}"), PromptTemplate("x"))).turns[0] == Turn("user", "{b}")
