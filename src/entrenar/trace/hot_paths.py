"""Which functions a program's time went to: system calls by the function that made them, and compute by span.

Rows do not overlap: a function's row holds the time of its system calls, a span's row its own time less the time of its
children and of the system calls made in it. Percentages are of the sum of all rows.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from entrenar.trace.anomaly import WAITS
from entrenar.trace.reader import Reader
from entrenar.trace.records import Frame, Tally
from entrenar.trace.tally import merge, percentile

_LIBRARY = ("/site-packages/", "/dist-packages/", "/lib/python3", "<frozen ")
# Spans that hold others and compute nothing themselves.
_STRUCTURE = ("process", "train", "epoch", "step")
# The name of the span of calls in which a helper thread or process waits for work: no row of the table holds them.
IDLE = "(idle)"
IDLE_CALLS = WAITS - {"nanosleep", "clock_nanosleep"}
NATIVE = Frame("<native code>", "", 0)


@dataclass
class HotPath:
    """A row: a function with its system calls (`kind` "calls"), or a span with its own time (`kind` "compute").

    `is_generated` says that a source map led from what ran to this function.
    """

    kind: str
    name: str
    file: str
    total_ns: int = 0
    calls: int = 0
    slow: int = 0
    # Nanoseconds by line, so that the row can name the line that cost most.
    lines: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    share: float = 0.0
    is_generated: bool = False

    @property
    def line(self) -> int:
        """Return the line that cost most; 0 if none is known."""
        return max(self.lines, key=lambda line: self.lines[line], default=0)


@dataclass(frozen=True)
class CallStatistics:
    """All calls of one name. Durations in nanoseconds."""

    name: str
    calls: int
    errors: int
    total_ns: int
    max_ns: int
    size_bytes: int
    histogram: dict[int, int]

    def percentile_ns(self, share: float) -> int:
        """Return the duration below which `share` of the calls lie, within 5 %."""
        return min(percentile(self.histogram, share), self.max_ns)


@dataclass(frozen=True)
class Profile:
    """The content of `trace report` and of the summary at the end of `trace run`."""

    functions: int
    calls: int
    call_ns: int
    wall_ns: int
    rows: list[HotPath]
    statistics: list[CallStatistics]


def is_library(frame: Frame) -> bool:
    """Return whether a frame belongs to Python or an installed package."""
    return any(part in frame.file for part in _LIBRARY) or frame.file.startswith("<frozen")


def responsible(stack: Sequence[Frame]) -> Frame:
    """Return the frame that a person would name for a call: the innermost of the program's own code.

    If there is none, the innermost that is not the import system's; `NATIVE` for an empty stack.
    """
    for frame in stack:
        if not is_library(frame):
            return frame
    for frame in stack:
        if not frame.file.startswith("<frozen"):
            return frame
    return stack[0] if stack else NATIVE


def profile(reader: Reader) -> Profile:
    """Sum up a trace."""
    tallies = list(reader.tallies())
    rows = {**_function_rows(tallies), **_compute_rows(reader, tallies)}
    total = sum(row.total_ns for row in rows.values()) or 1
    for row in rows.values():
        row.share = row.total_ns / total
    info = reader.info()
    functions = {(responsible(tally.stack).function, responsible(tally.stack).file) for tally in tallies}
    return Profile(
        functions=len(functions),
        calls=sum(tally.calls for tally in tallies),
        call_ns=sum(tally.total_ns for tally in tallies),
        wall_ns=(info.ended_ns or info.started_ns) - info.started_ns,
        rows=sorted(rows.values(), key=lambda row: -row.total_ns),
        statistics=statistics(tallies),
    )


def statistics(tallies: Iterable[Tally]) -> list[CallStatistics]:
    """Sum up calls by name, most expensive first."""
    by_name: dict[str, list[Tally]] = defaultdict(list)
    for tally in tallies:
        by_name[tally.name].append(tally)
    summed = [
        CallStatistics(
            name,
            sum(tally.calls for tally in group),
            sum(tally.errors for tally in group),
            sum(tally.total_ns for tally in group),
            max(tally.max_ns for tally in group),
            sum(tally.size_bytes for tally in group),
            merge([tally.histogram for tally in group]),
        )
        for name, group in by_name.items()
    ]
    return sorted(summed, key=lambda one: (-one.total_ns, one.name))


def call_graph(tallies: Iterable[Tally]) -> list[tuple[str, str, int, int]]:
    """Return (caller, callee, calls, nanoseconds) of every edge between functions, most expensive first."""
    edges: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for tally in tallies:
        names = [described(frame) for frame in reversed(tally.stack)] + [f"syscall: {tally.name}"]
        # A recursion goes along an edge many times; its calls count once.
        for edge in set(pairwise(names)):
            edges[edge][0] += tally.calls
            edges[edge][1] += tally.total_ns
    return sorted(((*edge, calls, ns) for edge, (calls, ns) in edges.items()), key=lambda row: -row[3])


def described(frame: Frame) -> str:
    """Write a frame as "function (file)"."""
    return f"{frame.function} ({os.path.basename(frame.file)})" if frame.file else frame.function  # noqa: PTH119


def _function_rows(tallies: Iterable[Tally]) -> dict[tuple[str, str, str], HotPath]:
    rows: dict[tuple[str, str, str], HotPath] = {}
    for tally in tallies:
        if tally.span_name == IDLE:
            continue
        frame = responsible(tally.stack)
        row = rows.setdefault(("calls", frame.function, frame.file), HotPath("calls", frame.function, frame.file))
        row.total_ns += tally.total_ns
        row.calls += tally.calls
        row.slow += tally.slow
        row.lines[frame.line] += tally.total_ns
        row.is_generated = frame.generated is not None
    return rows


def _compute_rows(reader: Reader, tallies: Iterable[Tally]) -> dict[tuple[str, str, str], HotPath]:
    """Return the spans' own time by name; structure and what never ended is left out."""
    own: defaultdict[str, int] = defaultdict(int)
    calls: defaultdict[str, int] = defaultdict(int)
    names: dict[int, str] = {}
    children: defaultdict[int, int] = defaultdict(int)
    for span in reader.spans():
        names[span.id] = span.name
        if span.duration_ns is not None:
            own[span.name] += span.duration_ns
            if span.parent is not None:
                children[span.parent] += span.duration_ns
    for parent, covered in children.items():
        if parent in names:
            own[names[parent]] -= covered
    for tally in tallies:
        if tally.span_name is not None and tally.span_name in own:
            own[tally.span_name] -= tally.total_ns
            calls[tally.span_name] += tally.calls
    return {
        ("compute", name, ""): HotPath("compute", name, "", total_ns=ns, calls=calls[name])
        for name, ns in own.items()
        if ns > 0 and name.partition(":")[0].partition(" ")[0] not in _STRUCTURE
    }
