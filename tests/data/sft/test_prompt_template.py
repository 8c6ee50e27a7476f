"""Prompts made from a row's fields: any name, nested fields, formats; what is not there is a fault."""

import pytest

from entrenar.data import SftConfig
from entrenar.data.sft.prompt_template import PromptTemplate
from entrenar.data.sft.turns import UnusableRowError

ROW = {
    "q": "why?", "my question": "what?", "größe": 3, "a.b": "dotted", "n": 7, "none": None, "yes": True,
    "answers": {"text": ["one", "two"], "a.b": 1}, "list": [{"t": "x"}], "{": "brace",
}  # fmt: skip


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{q}", "why?"),
        ("Q: {my question} A:", "Q: what? A:"),
        ("{größe}{n:>3}|{n:03d}", "3  7|007"),
        ("{a.b}", "dotted"),
        ("{answers.text[1]} {answers[text][0]}", "two one"),
        ("{list[0].t}{list.0.t}", "xx"),
        ("{{q}} {yes}", "{q} True"),
        ("no field", "no field"),
    ],
)
def test_fields_are_found_by_their_names(template, text):
    """Letters of any language, spaces and dots are names; dots and brackets look into nested fields."""
    assert PromptTemplate(template).fill(ROW) == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{other}", "no field 'other' for the template; the row has q, my question"),
        ("{none}", "field 'none' of the template is null in this row"),
        ("{answers.no}", "answers has no 'no' for the template"),
        ("{answers.text[2]}", r"answers.text has no '2' for the template, it is \['one', 'two'\]"),
        ("{q.x}", "q has no 'x' for the template, it is 'why"),
        ("{q:d}", "field 'q' cannot be written as 'd'"),
    ],
)
def test_what_a_row_lacks_is_a_fault_of_the_row(template, message):
    """A missing or null field never becomes an empty place or the word None."""
    with pytest.raises(UnusableRowError, match=message):
        PromptTemplate(template).fill(ROW)


@pytest.mark.parametrize("template", ["{", "}", "{}", "{ }", "{q!r}", "{q:{n}}", '{"label": "{q}"}', "{q"])
def test_a_brace_that_names_no_field_is_a_fault_of_the_config(template):
    """It would be written as it stands, and trained."""
    with pytest.raises(ValueError, match="prompt_template"):
        SftConfig.model_validate({"data": "a.jsonl", "prompt_template": template, "completion_template": "{q}"})


def test_a_template_knows_the_fields_it_uses():
    """The others are named to the user."""
    assert PromptTemplate("{q} {answers.text[0]} {a.b}").top_fields(ROW) == {"q", "answers", "a.b"}
