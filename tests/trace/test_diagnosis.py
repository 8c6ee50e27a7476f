"""The diagnosis names what was planted, first what costs most, and nothing on a healthy run."""

import pytest

from entrenar.trace.diagnosis import diagnose
from entrenar.trace.findings import Finding, as_json, lines
from entrenar.trace.records import Anomaly, Frame, Metric, Span, SystemCall

from .build import MS, Built, write

HEALTHY = {"data": 1.0, "forward": 20.0, "backward": 40.0, "optimizer": 5.0}
LAYERS = {f"{kind}_layer_{index}": 2.0 for index in range(4) for kind in ("attention", "mlp")}


@pytest.fixture
def found(tmp_path):
    """Diagnose a trace that was built."""

    def found(*parts, extra=()):
        with write(tmp_path / "trace.sqlite", *parts, extra=extra) as reader:
            return diagnose(reader)

    return found


def test_a_healthy_run_has_no_finding(found):
    """Time spent computing is no fault."""
    findings = found(Built(HEALTHY, LAYERS, save_ms=10))
    assert findings == []
    assert lines(findings) == ["Diagnosis: nothing stands out"]


def test_the_planted_three_are_the_first_three(found):
    """A slow loader, a slow operation and a slow save: each is found, the most costly first."""
    sick = HEALTHY | {"data": 60.0, "forward": 20.0}
    findings = found(Built(sick, LAYERS | {"compute: slow_matmul": 40.0}, save_ms=250))
    assert [finding.kind for finding in findings[:3]] == ["data", "operation", "save"]
    assert [finding.share for finding in findings] == sorted((f.share for f in findings), reverse=True)
    data, operation, save = findings[:3]
    assert data.title.startswith("Training waits for its data 3")
    assert "[data.py:42 in data_block]" in data.evidence[1]
    assert "slow_matmul" in operation.title
    assert "fsync" in save.evidence[1]
    assert "[checkpoint.py:88 in checkpoint_block]" in save.evidence[1]


def test_evidence_names_spans_to_open(found):
    """The slowest spans of the phase, so that a person sees them at once."""
    built = Built(HEALTHY | {"data": 60.0})
    (data,) = found(built)
    durations = {span.id: span.duration_ns for span in built.spans if span.name == "data"}
    assert list(data.spans) == sorted(durations, key=lambda number: -durations[number])[:3]
    text = "\n".join(lines([data]))
    assert f"open: span {data.spans[0]:016x}" in text
    assert "-> load ahead in a worker" in text


def test_a_layer_that_is_slower_than_its_siblings_is_named(found):
    """One layer in a wrong dtype, say."""
    (finding,) = found(Built(HEALTHY, LAYERS | {"mlp_layer_2": 6.0}))
    assert finding.kind == "sibling"
    assert finding.title.startswith("mlp_layer_2 is 3.0 times as slow as its siblings")


def test_garbage_collection_is_named(found):
    """Spans called gc that add up."""
    built = Built(HEALTHY)
    built.spans += [
        Span(1000 + i, None, "gc", 1, 1, 1000 * MS + i * 60 * MS, 1003 * MS + i * 60 * MS) for i in range(60)
    ]
    (finding,) = found(built)
    assert (finding.kind, "gc.freeze()" in finding.next_step) == ("garbage", True)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("steal_percent", 12.0, "steal"), ("throttled_percent", 30.0, "quota"), ("runqueue_percent", 25.0, "run queue"),
     ("gpu1.throttled", 1.0, "gpu throttled")],
)  # fmt: skip
def test_what_the_machine_did_is_named(found, name, value, kind):
    """Time given to others, a quota, a busy machine, a hot device; below the bound, nothing."""
    built = Built(HEALTHY)
    built.metrics = [Metric(name, 1000 * MS + i * 1000 * MS, value) for i in range(20)]
    (finding,) = found(built)
    assert finding.kind == kind
    built = Built(HEALTHY)
    built.metrics = [Metric(name, 1000 * MS + i * 1000 * MS, value / 20) for i in range(20)]
    if kind != "gpu throttled":
        assert found(built) == []


def memory(values: list[float]) -> list[Metric]:
    return [Metric("memory_bytes", index * 1000 * MS, value * 2**20) for index, value in enumerate(values)]


def test_memory_that_creeps_is_named_with_its_pace(found):
    """A megabyte a second, also under a sawtooth of garbage collections; the time that is left is told."""
    built = Built(HEALTHY)
    built.metrics = memory([500 + index + (index % 5) * 0.4 for index in range(120)])
    built.metrics.append(Metric("memory_available_bytes", 120_000 * MS, 7200 * 2**20))
    (finding,) = found(built)
    assert finding.kind == "memory"
    assert "3,600 MiB an hour" in finding.evidence[0]
    assert "2.0 hours more" in finding.evidence[1]


@pytest.mark.parametrize(
    "values",
    [
        [min(500 + 20 * index, 900) for index in range(120)],  # caches fill, then it stays
        [500 + (index % 20) * 5 for index in range(120)],  # a sawtooth goes back
        [500.0] * 60 + [900.0] * 60,  # one step is a larger batch, no leak
        [500 + index for index in range(8)],  # too short to tell
    ],
    ids=["start", "sawtooth", "one step", "short"],
)
def test_memory_that_settles_is_no_leak(found, values):
    """Growth at the start, a sawtooth, one larger batch and a short run say nothing."""
    built = Built(HEALTHY)
    built.metrics = memory(values)
    assert found(built) == []


def test_the_slow_rank_is_named(found):
    """All ranks' steps are equally long, because the others wait; the work between tells."""
    fast = HEALTHY | {"all_reduce": 30.0}
    slow = HEALTHY | {"backward": 65.0, "all_reduce": 5.0}
    parts = [Built(slow if rank == 2 else fast, rank=rank, pid=10 + rank, seed=rank) for rank in range(4)]
    finding = next(finding for finding in found(*parts) if finding.kind == "rank")
    assert finding.title == "Rank 2 holds up the others in backward"
    assert "slowest in 100% of the steps" in finding.evidence[0]


def test_equal_ranks_are_left_alone(found):
    """Noise makes some rank the slowest in each step, never the same one."""
    parts = [Built(HEALTHY | {"all_reduce": 5.0}, rank=rank, pid=10 + rank, seed=rank) for rank in range(4)]
    assert found(*parts) == []


def test_anomalies_and_shifts_are_summed_up(found):
    """Many far slower calls are one finding, with the worst; a shift says when it began."""
    frame = Frame("load", "/src/loader.py", 7)
    points = [
        Anomaly("read", "point", 2000 * MS, 9 * MS + i, 100_000, 9.0, "high", frame=frame, span=5) for i in range(20)
    ]
    shift = Anomaly("write", "shift", 3000 * MS, 4 * MS, 50_000, 12.0, "high", frame=frame)
    anomalies, level = found(Built(HEALTHY), extra=[*points, shift])
    assert anomalies.title == "20 calls or blocks were far slower than their like"
    assert "[loader.py:7 in load]" in anomalies.evidence[0]
    assert anomalies.spans == (5,)
    assert level.title == "write became slower at 2s and stayed so"


def test_slow_input_outside_of_the_phases_is_named(found, tmp_path):
    """A program without spans still has its slow function."""
    built = Built({}, steps=1)
    frame = Frame("load_checkpoint", "/src/app.py", 12)
    read = SystemCall("read", 1, 1, 1000 * MS, 4 * MS, 1, None, 1, "/x", (), (frame,))
    built.calls = [(read, None)] * 50
    built.now_ns = 2000 * MS
    (finding,) = found(built)
    assert finding.title == "load_checkpoint (app.py) spends 20% of the time in system calls"
    assert "50 of them longer than 1 ms" in finding.evidence[0]


def test_imports_before_the_first_step_are_no_finding(found):
    """Slow reads outside of all phases of a program that has some."""
    built = Built(HEALTHY)
    read = SystemCall("read", 1, 1, 100 * MS, 40 * MS, 1, None, 1, "/x", (), (Frame("<module>", "/src/app.py", 1),))
    built.calls += [(read, None)] * 50
    assert found(built) == []


def test_json_has_the_same(found):
    """Kind, share, evidence, next step, span ids in hex."""
    findings = found(Built(HEALTHY | {"data": 60.0}))
    (row,) = as_json(findings)
    assert row["kind"] == "data"
    assert row["spans"] == [f"{span:016x}" for span in findings[0].spans]
    assert row["share"] == pytest.approx(findings[0].share, abs=1e-4)


def test_a_person_is_told_the_first_findings_and_how_many_more_there_are():
    """A machine that is busy all the time gives a hundred; JSON has them all."""
    many = [Finding("slow", f"finding {number}", (), "look", 0.1) for number in range(20)]
    text = lines(many)
    assert sum("finding " in line for line in text) == 8
    assert text[-1] == "  12 more findings, each of less weight: --format json lists them"
    assert len(as_json(many)) == 20
