"""`report.follow`: each line is read once, when it is whole, and a file written again is read again."""

import json
import math

import pytest

from entrenar.errors import FormatError
from entrenar.files import atomic_write
from entrenar.report.follow import Follower, Tail
from entrenar.runs import RunFolder

from .conftest import record


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_line_is_read_once_and_only_when_it_is_whole(tmp_path):
    """Half a line waits for its other half."""
    tail = Tail(tmp_path / "a.jsonl")
    assert tail.read() == ([], False)
    whole = lines({"a": 1}, {"a": 2})
    with tail.path.open("w") as stream:
        for part, read in ((whole[:5], []), (whole[5:12], [{"a": 1}]), (whole[12:], [{"a": 2}]), ("", [])):
            stream.write(part)
            stream.flush()
            assert tail.read() == (read, False)


def test_what_is_no_object_is_left_out(tmp_path):
    """A damaged line costs itself alone."""
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n\xff\n{"a"\n[1]\n\n{"a": 2}\n')
    assert Tail(tmp_path / "a.jsonl").read() == ([{"a": 1}, {"a": 2}], False)


def test_a_file_that_is_replaced_or_cut_is_read_from_its_start(tmp_path):
    """As a resumed run does it, and as a person might."""
    tail = Tail(tmp_path / "a.jsonl")
    tail.path.write_text(lines({"a": 1}, {"a": 2}))
    tail.read()
    atomic_write(tail.path, lines({"a": 1}, {"a": 3}, {"a": 4}))
    assert tail.read() == ([{"a": 1}, {"a": 3}, {"a": 4}], True)
    tail.path.write_text(lines({"a": 5}))
    assert tail.read() == ([{"a": 5}], True)


def test_steps_and_events_are_followed_together(make_run):
    """A loss that was not finite is NaN; another program's record is refused by name."""
    folder = make_run("a", [record(1, loss=None)], [{"step": 1, "kind": "spike", "message": "m"}])
    follower = Follower(RunFolder(folder))
    first = follower.read()
    assert math.isnan(first.steps[0].loss)
    assert (first.events[0].kind, first.is_restart) == ("spike", False)
    assert follower.read().steps == []
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2}\n')
    with pytest.raises(FormatError, match="a StepRecord needs the field loss"):
        follower.read()
