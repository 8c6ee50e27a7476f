"""What tracing costs: a span, a layer's hooks, a system call, a step's bytes; and how many calls get the right line.

    python benchmarks/tracing.py [--out benchmarks/results/tracing.json] [--rounds 3]

Figures are processor time (user and system), of which other work on the machine takes no part; each is the least of
several rounds, taken in turns. strace on the same loop is the comparison.
"""

import argparse
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opentelemetry import trace as api

from entrenar.trace.launch import Wants
from entrenar.trace.provider import Provider
from entrenar.trace.ptrace.loop import Tracer
from entrenar.trace.ptrace.watch import CallWatcher
from entrenar.trace.reader import Reader
from entrenar.trace.recorder import Recorder
from entrenar.trace.spool import Spool

SPANS = 5_000
CALLS = 6_000
LINES = Path(__file__).parents[1] / "tests" / "trace" / "programs" / "lines.py"
LOOP = f"import os\nfd = os.open('/etc/hostname', 0)\nfor at in range({CALLS}): os.pread(fd, 64, 0)"


def cpu_us(work: Callable[[], None]) -> float:
    """Processor time of a call in microseconds."""
    started = time.process_time()
    work()
    return (time.process_time() - started) * 1e6


def recorder_spans(folder: Path) -> None:
    recorder = Recorder(folder, max_segments=1 << 20)
    for _ in range(SPANS):
        recorder.end(recorder.start(0, "attention_layer_0"))


def api_spans(tracer: api.Tracer) -> None:
    for step in range(SPANS):
        with tracer.start_as_current_span("forward_pass", attributes={"entrenar.step": step}):
            pass


def sdk_spans() -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class Nowhere(SpanExporter):
        def export(self, spans: Any) -> Any:  # noqa: ARG002 - the base class's
            return SpanExportResult.SUCCESS

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(Nowhere(), max_queue_size=1 << 17))
    api_spans(provider.get_tracer("x"))


def spans(folder: Path) -> dict[str, float]:
    """µs a span: our recorder, behind the API, the API alone, and OpenTelemetry's SDK with an exporter to nowhere."""
    folder.mkdir()
    wants = Wants(folder, 1, 2)
    ours = Provider(Recorder(folder, max_segments=1 << 20), wants).get_tracer()
    return {
        "recorder": cpu_us(lambda: recorder_spans(folder)) / SPANS,
        "recorder_behind_api": cpu_us(lambda: api_spans(ours)) / SPANS,
        "api_without_a_tracer": cpu_us(lambda: api_spans(api.NoOpTracer())) / SPANS,
        "sdk_with_batch_processor": cpu_us(sdk_spans) / SPANS,
    }


def children_us() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (usage.ru_utime + usage.ru_stime) * 1e6


def command_us(argv: list[str]) -> float:
    """Processor time of a command and all it starts."""
    before = children_us()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return children_us() - before


def calls(folder: Path) -> dict[str, float]:
    """µs that each call of a loop of reads costs more, tracer included, start-up subtracted."""
    folder.mkdir()
    run = [sys.executable, "-m", "entrenar", "trace", "run", "--save", str(folder / "t.sqlite")]
    tools = {"untraced": [], "ours": [*run, "--"], "ours_without_stacks": [*run, "--no-stacks", "--"]}
    if shutil.which("strace"):
        tools["strace"] = ["strace", "-f", "-T", "-y", "-o", "/dev/null"]
    found = {}
    for name, tool in tools.items():
        empty = command_us([*tool, sys.executable, "-S", "-c", "pass"])
        found[name] = (command_us([*tool, sys.executable, "-S", "-c", LOOP]) - empty) / CALLS
    return found


def attribution(folder: Path) -> dict[str, int]:
    """Return how many planted reads got their function and their line."""
    folder.mkdir()
    seen = []
    watcher = CallWatcher(seen.extend)
    python = Path(sys.executable).resolve()
    Tracer(watcher).run(python, [str(python), str(LINES), str(folder), "50"], dict(os.environ))
    watcher.tick()
    planted = [call for call in seen if call.name == "pread64" and Path(call.path or "/").parent == folder]
    right = sum(
        bool(call.stack)
        and call.stack[0].line == call.arguments[2] - 1000
        and Path(call.path).name in call.stack[0].function.split(".")
        for call in planted
    )
    return {"planted": len(planted), "right": right}


def memory(folder: Path, spans: int) -> dict[str, float]:
    """MiB that the recorder and its reader hold after a tenth of the spans and after all, read as they come."""
    folder.mkdir()
    recorder, spool = Recorder(folder), Spool(folder)
    held = {}
    for number in range(1, spans + 1):
        recorder.end(recorder.start(0, "x"))
        if number % 2_000 == 0:
            spool.drain()
        if number in (spans // 10, spans):
            held[f"after_{number}"] = resident_mib()
    return held | {"lost": recorder.dropped}


def resident_mib() -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def bytes_per_step(path: Path) -> dict[str, float]:
    """Return the size of a trace of a training run by its steps."""
    with Reader(path) as reader:
        steps = sum(1 for _ in reader.spans(name="step"))
        return {"file_bytes": path.stat().st_size, "steps": steps, "spans": reader.count("span"),
                "calls": reader.count("call"), "bytes_per_step": path.stat().st_size / max(steps, 1)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tracing.json")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-spans", type=int, default=1_000_000)
    parser.add_argument("--trace", type=Path, help="a trace of a training run, for the bytes of a step")
    parsed = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rounds = [
            {"spans_us": spans(folder / f"s{at}"), "calls_us": calls(folder / f"c{at}")} for at in range(parsed.rounds)
        ]
        least = {part: {key: min(one[part][key] for one in rounds) for key in rounds[0][part]} for part in rounds[0]}
        result = {
            "machine": {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version(),
                        "kernel": platform.release(), "processor": processor()},
            "least": least, "rounds": rounds, "attribution": attribution(folder / "a"),
            "memory_mib": memory(folder / "m", parsed.memory_spans),
        }  # fmt: skip
    if parsed.trace:
        result["training_run"] = bytes_per_step(parsed.trace)
    parsed.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "rounds"}, indent=1))


def processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


if __name__ == "__main__":
    main()
