"""Traced for real: what was planted leads the table and the diagnosis, and the machine's readings are in the trace."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from entrenar.errors import MachineError
from entrenar.trace import backends
from entrenar.trace.diagnosis import diagnose
from entrenar.trace.hot_paths import profile
from entrenar.trace.reader import Reader

PROGRAM = Path(__file__).parent / "programs" / "planted.py"


def can_trace() -> bool:
    try:
        return backends.choose("auto")[0] == "ptrace"
    except (OSError, MachineError):
        return False


pytestmark = pytest.mark.skipif(not can_trace(), reason="this machine does not permit ptrace")


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """Run the planted program under the tracer, once."""
    folder = tmp_path_factory.mktemp("planted")
    # The entry point that an installed entrenar has: the environment may be older than it.
    metadata = folder / "site" / "planted-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        "[opentelemetry_tracer_provider]\nentrenar = entrenar.trace.provider:from_environment\n"
    )
    paths = [str(metadata.parent), str(Path(__file__).parents[2] / "src"), os.environ.get("PYTHONPATH", "")]
    path = folder / "trace.sqlite"
    command = [sys.executable, "-m", "entrenar", "trace", "run", "--save", str(path), "--trace-compute", "--",
               sys.executable, str(PROGRAM), str(folder / "model.bin")]  # fmt: skip
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": ":".join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with Reader(path) as reader:
        yield reader, done.stderr


def test_the_planted_three_are_the_first_three_findings(trace):
    """Loader, operation and save, each with the line or the span to open."""
    reader, text = trace
    first = diagnose(reader)[:3]
    assert {finding.kind for finding in first} == {"data", "operation", "save"}
    told = {finding.kind: "\n".join((finding.title, *finding.evidence)) for finding in first}
    assert "[planted.py:22 in slow_load]" in told["data"]
    assert "slow_op" in told["operation"]
    assert "in slow_save]" in told["save"]
    assert all(reader.span(number) is not None for finding in first for number in finding.spans)
    assert "Diagnosis:\n  1. " in text


def test_the_planted_three_are_the_first_three_rows(trace):
    """The same in the table of hot paths, which also counts what the program did before its first step."""
    reader, _ = trace
    rows = [row for row in profile(reader).rows if row.name != "<module>"]
    assert {row.name for row in rows[:3]} == {"slow_load", "compute: slow_op", "slow_save"}


def test_the_machines_readings_are_in_the_trace(trace):
    """Processor and memory, once a second, while the program ran."""
    reader, _ = trace
    names = {metric.name for metric in reader.metrics()}
    assert {"cpu_percent", "memory_bytes", "memory_available_bytes"} <= names
    seconds = (reader.info().ended_ns - reader.info().started_ns) / 1e9
    assert len(list(reader.metrics(name="cpu_percent"))) <= seconds + 1


def test_a_full_collection_is_a_span_under_its_step(trace):
    """The collector's own time, where it happened."""
    reader, _ = trace
    full = [span for span in reader.spans(name="gc") if span.attributes.get("gc.generation") == 2]
    steps = {span.id: span.name for span in reader.spans() if span.name.startswith("step")}
    assert "step 2" in {steps.get(span.parent) for span in full}
    assert all(span.duration_ns >= 1_000_000 for span in full)
