"""The plain records of a trace, in the form that is stored and analyzed.

All times are nanoseconds of CLOCK_MONOTONIC, the one clock that the tracer and the traced program share;
`TraceInfo.unix_offset_ns` turns them into Unix time. All durations are nanoseconds too.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["unset", "ok", "error"]
Severity = Literal["low", "medium", "high"]


@dataclass(frozen=True, slots=True)
class Frame:
    """One function on a stack. `line` is the line that was running, 0 if it is not known.

    `generated` is where the frame was before a source map moved it, as "file:line".
    """

    function: str
    file: str
    line: int
    generated: str | None = None


@dataclass(frozen=True, slots=True)
class Process:
    """A process that was traced. `exit_code` is negative for a signal, None while it runs or if nobody saw the end."""

    pid: int
    parent_pid: int | None
    command: str
    started_ns: int
    ended_ns: int | None = None
    exit_code: int | None = None
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """A block of the program with a name. `end_ns` is None if the program died inside it.

    `id` is the OpenTelemetry span id: unique over all processes of a trace. `links` are (trace id, span id) pairs.
    """

    id: int
    parent: int | None
    name: str
    pid: int
    tid: int
    start_ns: int
    end_ns: int | None
    status: Status = "unset"
    attributes: Mapping[str, Any] = field(default_factory=dict)
    links: tuple[tuple[int, int], ...] = ()

    @property
    def duration_ns(self) -> int | None:
        """Duration, None if the span never ended."""
        return None if self.end_ns is None else self.end_ns - self.start_ns


@dataclass(frozen=True, slots=True)
class SystemCall:
    """One system call. `duration_ns` is None for a call that never returned; `result` too.

    `error` is the name of the errno. `size_bytes` is what a read or write moved, `path` its file. `stack` is the
    Python stack at the call, innermost frame first; empty where there is none. `span` is the span that was active on
    the thread.
    """

    name: str
    pid: int
    tid: int
    start_ns: int
    duration_ns: int | None
    result: int | None = None
    error: str | None = None
    size_bytes: int | None = None
    path: str | None = None
    arguments: tuple[int, ...] = ()
    stack: tuple[Frame, ...] = ()
    span: int | None = None


@dataclass(frozen=True, slots=True)
class Tally:
    """All calls of one name, from one stack, under one kind of span, counted, whether or not each one was kept.

    `histogram` maps a bin of `tally.bin_of(duration_ns)` to its number of calls; `slow` counts input or output of more
    than a millisecond.
    """

    name: str
    stack: tuple[Frame, ...]
    span_name: str | None
    calls: int
    errors: int
    total_ns: int
    max_ns: int
    size_bytes: int
    slow: int
    histogram: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Anomaly:
    """A call, block or step that lies far above its own past.

    `operation` is what is compared with itself: "read", "compute: matmul", "step". `kind` is "point" for a single
    value, "shift" for a new level that stays. `baseline_ns` is the centre of the past, `sigma` the distance from it in
    its spread.
    """

    operation: str
    kind: Literal["point", "shift"]
    at_ns: int
    duration_ns: int
    baseline_ns: int
    sigma: float
    severity: Severity
    pid: int | None = None
    tid: int | None = None
    span: int | None = None
    frame: Frame | None = None
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Metric:
    """One reading of a system metric: cpu_percent, memory_bytes, gpu0.temperature_c, ..."""

    name: str
    at_ns: int
    value: float


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at one instant: a decision of a transpiler, a signal, a note of the tracer."""

    kind: str
    text: str
    at_ns: int
    pid: int | None = None
    tid: int | None = None
    span: int | None = None


@dataclass(frozen=True, slots=True)
class TraceInfo:
    """A trace's description. `backend` names the source of the system calls: ptrace, strace, or none.

    `floor_ns` is how long a call that does nothing takes under this tracer: no duration below it means anything.
    """

    command: tuple[str, ...]
    trace_id: int
    started_ns: int
    unix_offset_ns: int
    backend: str
    floor_ns: int = 0
    ended_ns: int | None = None
    exit_code: int | None = None
    notes: tuple[str, ...] = ()
