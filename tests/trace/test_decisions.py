"""A code generator's log of decisions is read as the Rust tool reads it."""

import pytest

from entrenar.errors import FormatError
from entrenar.trace.decisions import logs_in, marks, read_decisions

LOG = """compiling finetune.py
[DECISION] optimization::inline_candidate input={"size": 4}
[DECISION] type_inference::infer_return input={"func": "foo"}
[RESULT] infer_return = {"type": "i32"}
[DECISION] optimization::inline_candidate input={"size": 90}
[RESULT] inline_candidate = {"decision": "no_inline"}
done
"""


def test_decisions_get_their_results():
    """A result belongs to the last decision of its name that waits for one; other lines are skipped."""
    first, second, third = read_decisions(LOG.splitlines())
    assert (first.category, first.name, first.input, first.result) == (
        "optimization", "inline_candidate", {"size": 4}, None,
    )  # fmt: skip
    assert (second.result, second.line) == ({"type": "i32"}, 3)
    assert third.result == {"decision": "no_inline"}


def test_decisions_become_instants_of_the_trace():
    """Each is a mark with its input and result."""
    mark = marks(read_decisions(LOG.splitlines()), at_ns=7)[1]
    assert (mark.kind, mark.at_ns) == ("decision", 7)
    assert mark.text == 'type_inference::infer_return {"func": "foo"} -> {"type": "i32"}'


def test_logs_are_found_by_their_name(tmp_path):
    """Those that end in .decisions.log, in order."""
    for name in ("b.decisions.log", "a.decisions.log", "other.log"):
        (tmp_path / name).write_text("")
    assert [path.name for path in logs_in(tmp_path)] == ["a.decisions.log", "b.decisions.log"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[DECISION] invalid", r"line 1: must have the form \[DECISION\] category::name input"),
        ("[DECISION] a::b input={invalid}", "line 1: must hold JSON, got '{invalid}'"),
        ("[RESULT] b = {}", "line 1: a result must follow its decision, but 'b' is not waiting"),
        ("[RESULT] b", r"must have the form \[RESULT\] name ="),
        ("[DECISION] a::b input=" + "[" * 100_000, "must hold JSON"),
    ],
)
def test_a_broken_line_is_refused(line, message):
    """The line and the form are named."""
    with pytest.raises(FormatError, match=message):
        read_decisions([line])
