"""Each call gets the span that was active on its thread, also across batches, threads and dropped spans."""

from entrenar.trace.join import Join
from entrenar.trace.records import SystemCall
from entrenar.trace.spool import SpanEvent


def start(span, at, name, *, tid=1, parent=None):
    return SpanEvent("start", 1, tid, span, at, parent, name)


def end(span, at, *, tid=1, kind="end"):
    return SpanEvent(kind, 1, tid, span, at, status="ok" if kind == "end" else "unset", attributes={})


def call(at, tid=1):
    return SystemCall("read", 1, tid, at, 1)


def joined(*batches):
    join = Join()
    return [join.take(events, calls, until) for events, calls, until in batches], join


def test_the_innermost_span_of_the_thread_is_the_calls():
    """Before, between, inside and after nested spans; another thread has none."""
    events = [start(1, 10, "step"), start(2, 20, "forward", parent=1), end(2, 30), end(1, 40)]
    (batch,), _ = joined((events, [call(5), call(15), call(25), call(35), call(45), call(25, tid=2)], None))
    found = {(one.start_ns, one.tid): (one.span, name) for one, name in zip(batch.calls, batch.span_names, strict=True)}
    assert found == {
        (5, 1): (None, None), (15, 1): (1, "step"), (25, 1): (2, "forward"), (35, 1): (1, "step"),
        (45, 1): (None, None), (25, 2): (None, None),
    }  # fmt: skip
    assert [(span.id, span.parent, span.duration_ns, span.status) for span in batch.ended] == [
        (2, 1, 10, "ok"), (1, None, 30, "ok"),
    ]  # fmt: skip
    assert batch.opened == []


def test_a_span_that_is_still_open_owns_its_calls():
    """A long span is known before it ends, and its end comes in a later batch."""
    (first, second), join = joined(([start(1, 10, "train")], [call(15)], None), ([end(1, 90)], [call(50)], None))
    assert [one.span for one in first.calls] == [1]
    assert [span.name for span in first.opened] == ["train"]
    assert [one.span for one in second.calls] == [1]
    assert join.open_spans() == []


def test_a_call_waits_until_no_span_around_it_can_still_be_dropped():
    """A block that turns out to be too short gives its calls to its parent."""
    begun = [start(1, 10, "step"), start(2, 20, "tiny", parent=1)]
    (first, second), _ = joined((begun, [call(21)], 15), ([end(2, 25, kind="drop"), end(1, 40)], [], None))
    assert first.calls == []
    assert [(one.span, name) for one, name in zip(second.calls, second.span_names, strict=True)] == [(1, "step")]
    assert [span.name for span in second.ended] == ["step"]


def test_a_span_that_ends_on_another_thread_is_closed():
    """An end is matched by its span, not by its thread."""
    (batch,), join = joined(([start(1, 10, "backward"), end(1, 30, tid=2)], [call(20)], None))
    assert [span.duration_ns for span in batch.ended] == [20]
    assert join.open_spans() == []


def test_marks_come_with_kind_and_text():
    """An instant keeps what it says."""
    (batch,), _ = joined(([SpanEvent("mark", 1, 1, 7, 15, text="exception\0ValueError: x")], [], None))
    (mark,) = batch.marks
    assert (mark.kind, mark.text, mark.span) == ("exception", "ValueError: x", 7)
