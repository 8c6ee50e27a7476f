"""A trace file gives back what was put into it, and stays bounded and readable."""

import sqlite3

import pytest

from entrenar.errors import DataError, FormatError
from entrenar.trace.reader import Reader
from entrenar.trace.records import Anomaly, Frame, Mark, Metric, Process, Span, SystemCall, TraceInfo
from entrenar.trace.store import Writer
from entrenar.trace.tally import bin_of, percentile

INNER, OUTER = Frame("load", "/work/data.py", 42), Frame("main", "/work/train.py", 7, generated="gen.py:9")
INFO = TraceInfo(("python", "train.py"), 0xABC << 100, 100, 5, "ptrace", floor_ns=9000, notes=("one", "two"))
SPAN = Span((1 << 63) + 5, None, "step", 1, 2, 100, 900, "ok", {"step": 3, "loss": 2.5}, ((1 << 127, 1 << 63),))
CALL = SystemCall("read", 1, 2, 200, 5_000, 64, None, 64, "/data.bin", (3, 0x7F00, 64), (INNER, OUTER), SPAN.id)


def written(path, *, calls=(CALL,), rows=100):
    writer = Writer(path, call_rows=rows)
    writer.add_info(INFO)
    writer.add_process(Process(1, None, "python train.py", 100))
    writer.add_process(Process(1, None, "python train.py", 100, 1000, -9, 0))
    writer.add_spans([SPAN])
    writer.add_calls(calls, ["step"] * len(calls))
    writer.add_anomalies([Anomaly("read", "point", 200, 5_000, 100, 4.2, "medium", 1, 2, SPAN.id, INNER, "/data.bin")])
    writer.add_metrics([Metric("cpu_percent", 150, 12.5)])
    writer.add_marks([Mark("decision", "inline", 160, 1, 2, SPAN.id)])
    return writer


def test_a_trace_gives_back_what_was_put_in(tmp_path):
    """Every record comes back equal."""
    path = tmp_path / "trace.sqlite"
    written(path).close()
    with Reader(path) as reader:
        assert reader.info() == INFO
        assert reader.processes() == [Process(1, None, "python train.py", 100, 1000, -9, 0)]
        assert list(reader.spans()) == list(reader.spans(name="step")) == [SPAN]
        assert list(reader.spans(name="other")) == []
        assert reader.span(SPAN.id) == SPAN
        assert reader.span(77) is None
        assert list(reader.calls()) == list(reader.calls(span=SPAN.id)) == [CALL]
        assert list(reader.calls(span=77)) == []
        (anomaly,) = reader.anomalies()
        assert (anomaly.frame, anomaly.span, anomaly.sigma) == (INNER, SPAN.id, 4.2)
        assert list(reader.metrics(name="cpu_percent")) == [Metric("cpu_percent", 150, 12.5)]
        assert list(reader.metrics(name="other")) == []
        assert list(reader.marks()) == [Mark("decision", "inline", 160, 1, 2, SPAN.id)]


def test_a_trace_can_be_read_while_it_is_written(tmp_path):
    """A commit is enough, and a writer that dies afterwards loses nothing of it."""
    path = tmp_path / "trace.sqlite"
    writer = written(path)
    writer.commit()
    with Reader(path) as reader:
        assert list(reader.calls()) == [CALL]
    writer.close()


def test_calls_beyond_the_budget_are_counted_and_only_slow_ones_kept(tmp_path):
    """The file stays bounded, the counts exact."""
    fast = [SystemCall("read", 1, 2, at, 5_000, 1, None, 1, stack=(INNER,)) for at in range(1000)]
    slow = SystemCall("read", 1, 2, 2000, 3_000_000, 1, None, 1, stack=(INNER,))
    failed = SystemCall("read", 1, 2, 3000, 10, -2, "ENOENT", stack=(INNER,))
    path = tmp_path / "trace.sqlite"
    written(path, calls=[*fast, slow, failed], rows=10).close()
    with Reader(path) as reader:
        kept = list(reader.calls())
        (tally,) = reader.tallies()
    assert slow in kept
    assert len(kept) < 1000 // 2 or all(call.duration_ns >= 5000 for call in kept)
    assert (tally.calls, tally.errors, tally.size_bytes, tally.slow) == (1002, 1, 1001, 1)
    assert tally.total_ns == 1000 * 5_000 + 3_000_000 + 10
    assert (tally.span_name, tally.stack) == ("step", (INNER,))
    assert percentile(tally.histogram, 0.5) == pytest.approx(5_000, rel=0.05)


def test_a_percentile_is_within_five_percent():
    """For any duration, the middle of its bin is near it."""
    for duration in (1, 2, 37, 999, 123_456, 10**9, 10**12):
        assert percentile({bin_of(duration): 1}, 0.99) == pytest.approx(duration, rel=0.1 if duration < 10 else 0.05)


def test_what_is_no_trace_of_this_version_is_refused(tmp_path):
    """A missing file, another file and another version say what they are."""
    with pytest.raises(DataError, match="is none; write one with `entrenar trace run`"):
        Reader(tmp_path / "none.sqlite")
    (tmp_path / "text").write_text("hello " * 1000)
    with pytest.raises(FormatError, match="is not a trace"):
        Reader(tmp_path / "text")
    path = tmp_path / "trace.sqlite"
    written(path).close()
    with sqlite3.connect(path) as db:
        db.execute("update meta set value = '99' where key = 'version'")
    db.close()
    with pytest.raises(FormatError, match="must be a trace of version 1, but has version 99; trace the program again"):
        Reader(path)
