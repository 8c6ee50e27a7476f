"""Exports hold what the trace holds, in the form that their viewers define."""

import gzip
import json
import shutil
import subprocess

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from entrenar.cli.main import main
from entrenar.trace.export.perfetto import perfetto
from entrenar.trace.export.stacks import call_stacks, flamegraph, pprof, span_stacks, speedscope
from entrenar.trace.hot_paths import IDLE
from entrenar.trace.reader import Reader
from entrenar.trace.records import Anomaly, Frame, Metric, Process, Span, SystemCall, TraceInfo
from entrenar.trace.store import Writer
from entrenar.trace.view import page

LOAD, MAIN = Frame("load", "/work/train.py", 42), Frame("<module>", "/work/train.py", 90)
MS = 1_000_000
NASTY = "</script><b>step"


@pytest.fixture
def path(tmp_path):
    """Two steps of 100 ms, a forward pass of 40 in the first, calls, an anomaly and a metric."""
    writer = Writer(tmp_path / "t.sqlite")
    writer.add_info(TraceInfo(("python", "train.py"), 1, 0, 10**18, "ptrace", 9_000, 300 * MS, 0))
    writer.add_process(Process(1, None, "python train.py", 0, 300 * MS, 0, rank=2))
    writer.add_spans([
        Span(1, None, "process: train.py", 1, 1, 0, 300 * MS),
        Span(2, 1, NASTY, 1, 1, 0, 100 * MS, "ok", {"loss": 2.5}),
        Span(3, 2, "forward_pass", 1, 1, 10 * MS, 50 * MS), Span(4, 1, NASTY, 1, 1, 100 * MS, 200 * MS),
        Span(5, 1, "backward_pass", 1, 1, 210 * MS, None),
    ])  # fmt: skip
    read = SystemCall("read", 1, 1, 20 * MS, 5 * MS, 64, None, 64, "/data", (3, 4, 5), (LOAD, MAIN), 3)
    idle = SystemCall("futex", 1, 9, 0, 300 * MS, 0)
    writer.add_calls([read, read, idle], ["forward_pass", "forward_pass", IDLE])
    writer.add_anomalies([Anomaly("read", "point", 20 * MS, 5 * MS, 100, 6.0, "high", 1, 1, 3, LOAD)])
    writer.add_metrics([Metric("cpu_percent", 50 * MS, 12.5)])
    writer.close()
    return tmp_path / "t.sqlite"


@pytest.fixture
def reader(path):
    with Reader(path) as reader:
        yield reader


def test_perfetto_has_every_span_and_call_on_its_thread(reader):
    """Microseconds from the start; what never ended lasts to the end; a counter, an instant, and the rank's name."""
    events = json.loads("".join(perfetto(reader)))["traceEvents"]
    by_kind = {}
    for event in events:
        by_kind.setdefault(event.get("cat") or event["ph"], []).append(event)
    spans = {(event["name"], event["ts"], event["dur"]) for event in by_kind["span"]}
    assert spans == {
        ("process: train.py", 0, 300_000), (NASTY, 0, 100_000), ("forward_pass", 10_000, 40_000),
        (NASTY, 100_000, 100_000), ("backward_pass", 210_000, 90_000),
    }  # fmt: skip
    read = next(event for event in by_kind["syscall"] if event["name"] == "read")
    assert (read["ts"], read["dur"], read["args"]["source"]) == (20_000, 5_000, "/work/train.py:42 in load")
    assert by_kind["M"][0]["args"] == {"name": "rank 2: python train.py"}
    assert by_kind["C"][0]["args"] == {"value": 12.5}
    assert by_kind["anomaly"][0]["name"] == "high: read"
    assert all({"pid", "tid", "ts", "dur"} <= set(event) for event in events if event["ph"] == "X")


def test_stacks_weigh_what_was_spent(reader):
    """Calls by the functions around them, spans by their own time; helper threads that wait are left out."""
    assert call_stacks(reader) == {("<module> (train.py)", "load (train.py)", "syscall: read"): (10 * MS, 2)}
    assert span_stacks(reader) == {
        ("process: train.py",): (100 * MS, 1), ("process: train.py", NASTY): (160 * MS, 2),
        ("process: train.py", NASTY, "forward_pass"): (40 * MS, 1),
    }  # fmt: skip
    lines = list(flamegraph(reader))
    assert "<module> (train.py);load (train.py);syscall: read 10000\n" in lines
    assert len(lines) == 4


def test_speedscope_has_the_shape_its_schema_demands(reader):
    """Every sample names frames that exist, and the weights sum to the end value."""
    values = speedscope(reader)
    assert values["$schema"] == "https://www.speedscope.app/file-format-schema.json"
    assert [profile["type"] for profile in values["profiles"]] == ["sampled", "sampled"]
    for profile in values["profiles"]:
        assert len(profile["samples"]) == len(profile["weights"])
        assert sum(profile["weights"]) == profile["endValue"]
        assert all(frame < len(values["shared"]["frames"]) for sample in profile["samples"] for frame in sample)
    frames = [values["shared"]["frames"][at]["name"] for at in values["profiles"][0]["samples"][0]]
    assert frames == ["<module> (train.py)", "load (train.py)", "syscall: read"]


def profile_message():
    """Build pprof's message from its definition, profile.proto, for protobuf's own parser."""
    file = descriptor_pb2.FileDescriptorProto(name="profile.proto", package="p", syntax="proto3")
    fields = {
        "ValueType": [("type", 1, 3), ("unit", 2, 3)],
        "Sample": [("location_id", 1, 4, "repeated"), ("value", 2, 3, "repeated")],
        "Line": [("function_id", 1, 4), ("line", 2, 3)],
        "Location": [("id", 1, 4), ("line", 4, "Line", "repeated")],
        "Function": [("id", 1, 4), ("name", 2, 3), ("filename", 4, 3)],
        "Profile": [
            ("sample_type", 1, "ValueType", "repeated"), ("sample", 2, "Sample", "repeated"),
            ("location", 4, "Location", "repeated"), ("function", 5, "Function", "repeated"),
            ("string_table", 6, 9, "repeated"), ("time_nanos", 9, 3), ("duration_nanos", 10, 3),
        ],
    }  # fmt: skip
    for name, rows in fields.items():
        message = file.message_type.add(name=name)
        for field, number, kind, *repeated in rows:
            added = message.field.add(name=field, number=number, label=3 if repeated else 1)
            if isinstance(kind, str):
                added.type, added.type_name = 11, f".p.{kind}"
            else:
                added.type = kind
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("p.Profile"))()


def test_pprof_is_read_by_protobufs_own_parser(reader):
    """Strings, functions, lines and values come back."""
    profile = profile_message()
    profile.ParseFromString(gzip.decompress(pprof(reader)))
    text = list(profile.string_table)
    assert text[0] == ""
    assert [(text[one.type], text[one.unit]) for one in profile.sample_type] == [
        ("syscalls", "count"), ("time", "nanoseconds"),
    ]  # fmt: skip
    functions = {one.id: (text[one.name], text[one.filename]) for one in profile.function}
    lines = {one.id: (*functions[one.line[0].function_id], one.line[0].line) for one in profile.location}
    samples = {tuple(lines[at] for at in one.location_id): list(one.value) for one in profile.sample}
    assert samples[("syscall: read", "", 0), ("load", "/work/train.py", 42), ("<module>", "/work/train.py", 90)] == [
        2, 10 * MS,
    ]  # fmt: skip
    assert (profile.time_nanos, profile.duration_nanos) == (10**18, 300 * MS)


@pytest.mark.parametrize("form", ["perfetto", "speedscope", "otlp", "flamegraph", "pprof"])
def test_the_command_writes_a_file_beside_the_trace(form, path, capsys):
    """And says what opens it."""
    assert main(["trace", "export", str(path), "--to", form]) == 0
    name, _, advice = capsys.readouterr().out.partition("   open it with ")
    assert path.parent.joinpath(name).stat().st_size > 50
    assert advice.strip()


def test_the_page_holds_everything_and_cannot_be_broken_out_of(reader):
    """A span named like a tag stays a name, and no other file is asked for."""
    text = page(reader, ["Diagnosis:", "  1. slow"])
    assert text.count("</script>") == 1
    assert "@DATA@" not in text
    assert "src=" not in text
    assert "href=" not in text
    data = json.loads(text.split("const D = ", 1)[1].split(";\nconst $", 1)[0])
    assert [row[3] for row in data["spans"]] == ["process: train.py", NASTY, "forward_pass", NASTY, "backward_pass"]
    assert data["calls"][1] == [20_000, 5_000, 1, "read", "/data", "64 bytes", "/work/train.py:42 in load"]
    assert data["spans"][4][4] == {"never ended": True}
    assert data["flames"][0]["tree"]["v"] == 10_000
    assert data["diagnosis"] == ["  1. slow"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_the_page_draws_itself_in_a_browser(path, tmp_path):
    """Headless Chromium runs the page's script to its end."""
    assert main(["trace", "view", str(path), "-o", str(tmp_path / "t.html")]) == 0
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--virtual-time-budget=2000", "--dump-dom", (tmp_path / "t.html").as_uri()],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert 'data-drawn="5 spans, 3 calls"' in done.stdout


def test_the_live_view_shows_where_the_program_is(path, capsys):
    """The open span, the rows and the last anomaly."""
    assert main(["trace", "live", str(path), "--once"]) == 0
    shown = capsys.readouterr().out
    assert "now: backward_pass" in shown
    assert "load (train.py:42)" in shown
    assert "read 5ms (6.0σ)" in shown
