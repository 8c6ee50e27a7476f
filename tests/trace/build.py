"""Traces written by hand, so that what a diagnosis must find is known."""

import itertools
import random
from dataclasses import dataclass, field
from pathlib import Path

from entrenar.trace.reader import Reader
from entrenar.trace.records import Frame, Metric, Process, Span, SystemCall, TraceInfo
from entrenar.trace.store import Writer

MS = 1_000_000


@dataclass
class Built:
    """A program of steps: `phases_ms` in each, `layers_ms` inside forward, `save_ms` every tenth step."""

    phases_ms: dict[str, float]
    layers_ms: dict[str, float] = field(default_factory=dict)
    save_ms: float = 0.0
    steps: int = 60
    rank: int | None = None
    noise: float = 0.02
    seed: int = 0
    pid: int = 1
    spans: list[Span] = field(default_factory=list)
    calls: list[tuple[SystemCall, str | None]] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)
    now_ns: int = 1000 * MS

    def __post_init__(self) -> None:
        self.ids = itertools.count(self.pid << 32 | 1)
        self.random = random.Random(self.seed)
        for step in range(self.steps):
            self._step(step)

    def _ms(self, milliseconds: float) -> int:
        return round(milliseconds * MS * max(0.1, self.random.gauss(1, self.noise)))

    def _step(self, step: int) -> None:
        number, started = next(self.ids), self.now_ns
        for name, milliseconds in self.phases_ms.items():
            self._phase(name, number, milliseconds)
        if self.save_ms and step % 10 == 9:
            self._phase("checkpoint", number, self.save_ms)
        self._span(number, None, f"step {step}", started, self.now_ns)

    def _phase(self, name: str, parent: int, milliseconds: float) -> None:
        number, started = next(self.ids), self.now_ns
        if name in ("data", "checkpoint"):
            path, line = ("/corpus/train.bin", 42) if name == "data" else ("/runs/model.safetensors", 88)
            call = "pread64" if name == "data" else "fsync"
            frame = Frame(f"{name}_block", f"/home/me/{name}.py", line)
            duration = self._ms(milliseconds) * 9 // 10
            one = SystemCall(
                call, self.pid, self.pid, started, duration, 0, None, 4096, path, stack=(frame,), span=number
            )
            self.calls.append((one, name))
        end = started + self._ms(milliseconds)
        if name == "forward":
            at = started
            for layer, layer_ms in self.layers_ms.items():
                duration = self._ms(layer_ms)
                self._span(next(self.ids), number, layer, at, at + duration)
                at += duration
            end = max(end, at)
        self._span(number, parent, name, started, end)
        self.now_ns = end

    def _span(self, number: int, parent: int | None, name: str, started: int, ended: int) -> None:
        self.spans.append(Span(number, parent, name, self.pid, self.pid, started, ended))


def write(path: Path, *parts: Built, extra=(), floor_ns: int = 0) -> Reader:
    """Write the trace of one or more ranks; `extra` are anomalies."""
    writer = Writer(path)
    end = max(part.now_ns for part in parts)
    writer.add_info(TraceInfo(("python", "train.py"), 7, 1000 * MS, 0, "ptrace", floor_ns, end, 0))
    for part in parts:
        writer.add_process(Process(part.pid, None, "python train.py", 1000 * MS, end, 0, part.rank))
        writer.add_spans(part.spans)
        writer.add_calls([call for call, _ in part.calls], [name for _, name in part.calls])
        writer.add_metrics(part.metrics)
    writer.add_anomalies(extra)
    writer.close()
    return Reader(path)
