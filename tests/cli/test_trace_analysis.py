"""The verbs of `entrenar trace` that look at a recorded trace, and the script for profiles."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from entrenar.cli.main import main
from entrenar.trace.records import Frame, Span, SystemCall, TraceInfo
from entrenar.trace.store import Writer

ROOT = Path(__file__).parents[2]
MS = 1_000_000


def write(path: Path, *, slow_reads: int = 2, backward_ms: float = 40.0) -> Path:
    """A trace of 100 steps: a read, then a backward; `slow_reads` reads take 9 ms."""
    writer = Writer(path)
    frame = Frame("load", "/src/loader.py", 42)
    calls, spans, now = [], [], 0
    for step in range(100):
        duration = 9 * MS if step >= 100 - slow_reads else (100_000 if step % 2 else 110_000)
        calls.append(SystemCall("read", 1, 1, now, duration, 4096, None, 4096, "/data/a.bin", stack=(frame,)))
        calls.append(SystemCall("fsync", 1, 1, now, round((2 + step % 7 / 50) * MS), 0, stack=(frame,)))
        end = now + 10 * MS + round(backward_ms * MS * (1 + step % 5 / 100))
        spans.append(Span(step + 1, None, "backward", 1, 1, now + 10 * MS, end))
        now = end
    writer.add_info(TraceInfo(("python", "train.py"), 1, 0, 0, "ptrace", ended_ns=now))
    writer.add_calls(calls, [None] * len(calls))
    writer.add_spans(spans)
    writer.close()
    return path


def test_anomalies_are_told_with_their_lines(tmp_path, capsys):
    """The lines and the report of section 4.3, from a recorded trace; short with --short; JSON adds up."""
    trace = write(tmp_path / "trace.sqlite")
    assert main(["trace", "anomalies", str(trace)]) == 0
    out = capsys.readouterr().out
    assert out.count("⚠️ ANOMALY: read took 9000 µs (") == 2
    assert "σ from baseline 10" in out
    assert "- 🔴 High  [loader.py:42 in load]" in out
    assert "Total anomalies detected: 2" in out
    assert main(["trace", "anomalies", str(trace), "--short"]) == 0
    assert "Total anomalies: 2 (2 High, 0 Medium, 0 Low)" in capsys.readouterr().out
    assert main(["trace", "anomalies", str(trace), "--format", "json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["total"] == sum(values["severity"].values()) == len(values["anomalies"]) == 2


def test_a_senseless_threshold_is_refused(tmp_path, capsys):
    """Exit code 2, with the rule."""
    assert main(["trace", "anomalies", str(write(tmp_path / "t.sqlite")), "--anomaly-threshold", "-1"]) == 2
    assert "anomaly threshold must be > 0, got -1.0" in capsys.readouterr().err


def test_a_trace_that_is_not_there_is_refused(tmp_path, capsys):
    """Exit code 2, with the remedy."""
    for verb in (["anomalies"], ["clusters"], ["diff", "x"]):
        assert main(["trace", *verb, str(tmp_path / "none.sqlite")]) == 2
        assert "entrenar trace run" in capsys.readouterr().err


def test_clusters_are_told_in_text_and_in_the_specifications_json(tmp_path, capsys):
    """Two modes here: reads and fsyncs; the two slow reads are outliers."""
    pytest.importorskip("sklearn", reason="clusters need scikit-learn: pip install 'entrenar[trace]'")
    trace = write(tmp_path / "trace.sqlite")
    assert main(["trace", "clusters", str(trace), "--ml-clusters", "2", "--ml-compare"]) == 0
    out = capsys.readouterr().out
    assert "=== ML Anomaly Analysis ===" in out
    assert "(good separation)" in out
    assert "High-latency cluster: 102 syscalls (fsync, read)" in out
    assert "Outliers: 2 extreme syscalls (>8σ)" in out
    assert main(["trace", "clusters", str(trace), "--ml-clusters", "2", "--format", "json"]) == 0
    analysis = json.loads(capsys.readouterr().out)["ml_analysis"]
    assert list(analysis) == ["clusters", "silhouette_score", "high_latency_cluster", "outliers"]


@pytest.fixture
def script(tmp_path):
    """Run scripts/analyze_training.sh on a profile."""

    def script(content) -> subprocess.CompletedProcess:
        profile = tmp_path / "training-profile.json"
        profile.write_text(content if isinstance(content, str) else json.dumps(content))
        return subprocess.run(
            [str(ROOT / "scripts" / "analyze_training.sh"), str(profile)], capture_output=True, text=True, check=False,
            env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT / "src")},
        )  # fmt: skip

    return script


PROFILE = {
    "format": "entrenar-trace-json-v1",
    "ml_analysis": {
        "clusters": 5,
        "silhouette_score": 0.72,
        "high_latency_cluster": {
            "cluster_id": 4, "avg_latency_us": 12345, "syscalls": ["read", "fsync", "write"], "count": 23,
        },
        "outliers": [{"syscall": "read", "latency_us": 45678, "z_score": 8.2}],
    },
}  # fmt: skip


def test_the_script_tells_a_profile(script):
    """The specification's object gives its lines, and no N/A."""
    done = script(PROFILE)
    assert done.returncode == 0, done.stderr
    assert "Silhouette Score: 0.72 (good separation)" in done.stdout
    assert "High-latency cluster: 23 syscalls (read, fsync, write)" in done.stdout
    assert "N/A" not in done.stdout


@pytest.mark.parametrize("field", ["clusters", "silhouette_score", "high_latency_cluster", "outliers"])
def test_the_script_fails_on_a_missing_field(script, field):
    """Exit code 2 and the field's name, nothing on standard output."""
    analysis = {key: value for key, value in PROFILE["ml_analysis"].items() if key != field}
    done = script(PROFILE | {"ml_analysis": analysis})
    assert done.returncode == 2
    assert f"ml_analysis.{field} is missing" in done.stderr
    assert done.stdout == ""


def test_the_script_needs_a_file(script, tmp_path):
    """No argument, no file, no JSON: exit code 2 each."""
    program = str(ROOT / "scripts" / "analyze_training.sh")
    assert subprocess.run([program], capture_output=True, check=False).returncode == 2
    assert subprocess.run([program, str(tmp_path / "none")], capture_output=True, check=False).returncode == 2
    assert script("not json").returncode == 2


def test_a_difference_is_told(tmp_path, capsys):
    """Backward got slower; the reads did not."""
    before, after = write(tmp_path / "one.sqlite"), write(tmp_path / "two.sqlite", backward_ms=60.0)
    assert main(["trace", "diff", str(before), str(after)]) == 0
    out = capsys.readouterr().out
    assert "phase backward: 40.8ms -> 61.2ms, 1.50 times" in out
    assert "read" not in out
    assert main(["trace", "diff", str(before), str(after), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows if row["changed"]] == ["backward"]


def test_a_trace_does_not_differ_from_itself(tmp_path, capsys):
    """Nothing changed."""
    trace = str(write(tmp_path / "one.sqlite"))
    assert main(["trace", "diff", trace, trace]) == 0
    assert capsys.readouterr().out.strip().endswith("0 changed")


def test_a_map_tells_where_code_was_written(tmp_path, capsys, monkeypatch):
    """All entries, or one line; 1 if the map does not know it."""
    content = {
        "version": 1, "source_language": "python", "mappings": [{
            "generated_file": "out.py", "generated_line": 3, "original_file": "src.py", "original_line": 42,
            "original_function": "load", "transpiler_decision": {"optimization": "inline"},
        }],
    }  # fmt: skip
    (tmp_path / "out.map.json").write_text(json.dumps(content))
    (tmp_path / "out.py").write_text("pass\n" * 9)
    monkeypatch.chdir(tmp_path)
    assert main(["trace", "map", "out.map.json"]) == 0
    assert "3 [src.py:42 in load]  inline" in capsys.readouterr().out
    assert main(["trace", "map", "out.map.json", "--at", "out.py:5"]) == 0
    assert capsys.readouterr().out == "out.py:5 [src.py:42 in load]\n"
    assert main(["trace", "map", "out.map.json", "--at", "out.py:1"]) == 1
    assert main(["trace", "map", "out.map.json", "--at", "out.py"]) == 2
    assert "--at must be FILE:LINE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--source-map", "none.json"], "a source map must be a file or a folder, and there is none at none.json"),
        (["--transpiler-map", "broken.json"], "broken.json must be a source map in JSON"),
        (["--trace-transpiler-decisions", "none.log"], "a decision log must be a file, and there is none at none.log"),
        (["--trace-transpiler-decisions", "bad.log"], "bad.log, line 1: must have the form [DECISION]"),
    ],
)
def test_a_broken_map_or_log_is_refused_before_the_program_starts(tmp_path, monkeypatch, capsys, flags, message):
    """Exit code 2 with the reason, and nothing ran."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "bad.log").write_text("[DECISION] what\n")
    assert main(["trace", "run", *flags, "--backend", "none", "--", "touch", "ran"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
