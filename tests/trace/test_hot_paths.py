"""The table of hot paths adds up, names the program's own code, and marks slow input and output."""

import pytest

from entrenar.trace import report_json, report_text
from entrenar.trace.hot_paths import IDLE, NATIVE, call_graph, profile, responsible
from entrenar.trace.reader import Reader
from entrenar.trace.records import Frame, Span, SystemCall, TraceInfo
from entrenar.trace.store import Writer

LOAD, MAIN = Frame("load", "/work/train.py", 42), Frame("<module>", "/work/train.py", 90)
LIBRARY = Frame("read_text", "/usr/lib/python3.11/pathlib.py", 1059)
IMPORT = Frame("get_data", "<frozen importlib._bootstrap_external>", 1131)
PACKAGE = Frame("<module>", "/venv/lib/python3.11/site-packages/torch/__init__.py", 7)
MS = 1_000_000


def call(name="read", duration_ns=MS, stack=(LOAD, MAIN), **more):
    return SystemCall(name, 1, 1, 0, duration_ns, more.pop("result", 10), stack=stack, **more)


@pytest.fixture
def reader(tmp_path):
    """Load waits 60 ms in four calls, one of them slow; forward computes 30 ms, of which a call takes 10."""
    writer = Writer(tmp_path / "t.sqlite")
    writer.add_info(TraceInfo(("python", "train.py"), 1, 0, 0, "ptrace", 9_000, 200 * MS, 0))
    slow = [call(duration_ns=57 * MS), call(), call(), call()]
    inside = call("futex", 10 * MS, stack=())
    idle = call("futex", 500 * MS, stack=())
    writer.add_calls([*slow, inside, idle], [None, None, None, None, "forward_pass", IDLE])
    writer.add_spans([
        Span(1, None, "process: train.py", 1, 1, 0, 200 * MS), Span(2, 1, "step", 1, 1, 0, 100 * MS),
        Span(3, 2, "forward_pass", 1, 1, 0, 40 * MS), Span(4, 3, "attention_layer_0", 1, 1, 5 * MS, 15 * MS),
        Span(5, 2, "backward_pass", 1, 1, 50 * MS, None),
    ])  # fmt: skip
    writer.close()
    with Reader(tmp_path / "t.sqlite") as reader:
        yield reader


def test_rows_hold_each_ones_own_time_and_add_up(reader):
    """A span's own time is less its children's and its calls'; structure and idle threads are no rows."""
    summary = profile(reader)
    rows = {row.name: (row.kind, row.total_ns, row.calls, row.slow) for row in summary.rows}
    assert rows == {
        "load": ("calls", 60 * MS, 4, 1),
        NATIVE.function: ("calls", 10 * MS, 1, 0),
        "forward_pass": ("compute", 20 * MS, 1, 0),
        "attention_layer_0": ("compute", 10 * MS, 0, 0),
    }
    assert sum(row.share for row in summary.rows) == pytest.approx(1)
    assert summary.rows[0].line == 42
    assert (summary.calls, summary.functions, summary.wall_ns) == (6, 2, 200 * MS)


def test_the_table_reads_as_the_specification_has_it(reader):
    """Heading, totals, rank, share, time, calls, and the mark of slow input."""
    text = "\n".join(report_text.hot_paths(profile(reader), with_source=True))
    assert "Function Profiling Summary:\n" in text
    assert (
        "Total functions profiled: 2\nTotal syscalls: 6 (570ms of 200ms wall)\n\nTop 10 Hot Paths (by total time):"
        in text
    )
    assert " 1. load (train.py:42)" in text
    assert "-  60.0% (60ms, 4 syscalls) ⚠️ SLOW I/O (1 over 1ms)" in text
    assert " 2. compute: forward_pass" in text


def test_a_call_is_laid_to_the_programs_own_code():
    """Whoever called the library; without code of its own the library; without that the import."""
    assert responsible((LIBRARY, LOAD, MAIN)) == LOAD
    assert responsible((IMPORT, PACKAGE)) == PACKAGE
    assert responsible((IMPORT,)) == IMPORT
    assert responsible(()) == NATIVE


def test_the_call_graph_has_every_edge_once(reader):
    """Recursion does not count a call twice."""
    edges = {(caller, callee): calls for caller, callee, calls, _ in call_graph(reader.tallies())}
    assert edges == {
        ("<module> (train.py)", "load (train.py)"): 4, ("load (train.py)", "syscall: read"): 4,
    }  # fmt: skip
    (line,) = [line for line in report_text.graph_table(call_graph(reader.tallies())) if "syscall: read" in line]
    assert line == "  load (train.py) -> syscall: read  4  60ms"


def test_the_tables_of_calls_count_what_there_is(reader):
    """As strace -c, and with percentiles."""
    statistics = profile(reader).statistics
    table = "\n".join(report_text.call_table(statistics))
    assert "510.0" not in table
    assert "0.510000    255000.0         2           futex" in table
    assert "100%    0.570000                     6         0 total" in table
    rows = report_text.percentile_table(statistics, 9_000)
    assert rows[1].split()[:2] == ["futex", "2"]
    assert rows[-1] == "A call that does nothing takes 9.0 µs under this tracer."


def test_a_call_is_printed_as_strace_would_with_its_line():
    """Arguments, result or error, time, file, line."""
    one = call(arguments=(3, 0x7F0012345678, 64), path="/data.bin", duration_ns=5_234_000)
    assert report_text.call_line(one, with_source=True, with_time=True) == (
        "read(3, 0x7f0012345678, 64) = 10 <0.005234> /data.bin  [train.py:42 in load]"
    )
    failed = call("openat", result=-2, error="ENOENT", arguments=((1 << 64) - 100, 1, 0), stack=())
    assert report_text.call_line(failed, with_source=True, with_time=False) == "openat(-100, 1, 0) = -1 ENOENT"


def test_json_holds_everything_and_csv_the_calls(reader):
    """The sums of the JSON are those of the table."""
    values = report_json.as_json(reader, profile(reader))
    assert values["format"] == report_json.FORMAT
    assert sum(row["total_us"] for row in values["summary"]["statistics"]) == values["summary"]["syscall_time_us"]
    assert len(values["syscalls"]) == 6
    assert values["syscalls"][0]["source"] == {"file": "/work/train.py", "line": 42, "function": "load"}
    assert {span["name"] for span in values["spans"]} >= {"step", "forward_pass"}
    lines = list(report_json.as_csv(reader))
    assert len(lines) == 7
    assert lines[1].startswith("read,1,1,0,57000.0,10,,,,/work/train.py,42,load,")


@pytest.mark.parametrize(
    ("nanoseconds", "shown"),
    [(7, "7ns"), (1234, "1.23µs"), (998.4e6, "998ms"), (999.6e6, "1000ms"), (1e9, "1s"), (4321e9, "4321s")],
)
def test_a_duration_is_written_without_an_exponent(nanoseconds, shown):
    """Three digits and a unit, also where rounding reaches the next one."""
    assert report_text.duration(nanoseconds) == shown
