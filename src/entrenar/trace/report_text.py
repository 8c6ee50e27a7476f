"""Write what a trace says for a person: hot paths, system calls, call graph."""

import os
from collections.abc import Iterable, Sequence

from entrenar.trace import source_map
from entrenar.trace.hot_paths import CallStatistics, HotPath, Profile
from entrenar.trace.records import SystemCall

_PERCENTILES = (0.5, 0.75, 0.9, 0.95, 0.99)
_GRAPH_ROWS = 20


def duration(nanoseconds: float) -> str:
    """Write a duration with three digits and its unit."""
    for limit, unit in ((1e9, "s"), (1e6, "ms"), (1e3, "µs")):
        if nanoseconds >= limit:
            value = nanoseconds / limit
            return f"{value:.3g}{unit}" if value < 999.5 else f"{value:.0f}{unit}"  # .3g would write 1e+03
    return f"{nanoseconds:.0f}ns"


def hot_paths(profile: Profile, *, top: int = 10, with_source: bool = False) -> list[str]:
    """Return section 4.1's table: share, time and system calls of the most expensive functions and spans."""
    lines = [
        "Function Profiling Summary:",
        "===========================",
        f"Total functions profiled: {profile.functions:,}",
        f"Total syscalls: {profile.calls:,} ({duration(profile.call_ns)} of {duration(profile.wall_ns)} wall)",
        "",
        f"Top {top} Hot Paths (by total time):",
    ]
    shown = profile.rows[:top]
    width = max((len(label(row, with_source=with_source)) for row in shown), default=0)
    for number, row in enumerate(shown, 1):
        name = label(row, with_source=with_source)
        calls = f", {row.calls:,} syscalls" if row.calls or row.kind == "calls" else ""
        slow = f" ⚠️ SLOW I/O ({row.slow:,} over 1ms)" if row.slow else ""
        lines.append(f"  {number:2d}. {name:<{width}} - {row.share:6.1%} ({duration(row.total_ns)}{calls}){slow}")
    if not shown:
        lines.append("  nothing was seen")
    return lines


def label(row: HotPath, *, with_source: bool) -> str:
    """Write what a row is about: function and file, or the span."""
    if row.kind == "compute":
        return row.name if row.name.startswith("compute") else f"compute: {row.name}"
    if not row.file:
        return row.name
    if row.is_generated:
        return source_map.label(row.name, row.file, row.line)
    place = os.path.basename(row.file)  # noqa: PTH119
    return f"{row.name} ({place}:{row.line})" if with_source and row.line else f"{row.name} ({place})"


def call_table(rows: Sequence[CallStatistics]) -> list[str]:
    """Return strace's table: share, seconds, mean, calls and errors of each system call."""
    total, calls, errors = (sum(getattr(row, name) for row in rows) for name in ("total_ns", "calls", "errors"))
    lines = [
        "% time     seconds  usecs/call     calls    errors syscall",
        "------ ----------- ----------- --------- --------- ----------------",
    ]
    for row in rows:
        mean = row.total_ns / row.calls / 1e3
        failed = f"{row.errors:9d}" if row.errors else " " * 9
        share = row.total_ns / (total or 1)
        lines.append(f"{share:6.2%} {row.total_ns / 1e9:11.6f} {mean:11.1f} {row.calls:9d} {failed} {row.name}")
    lines += [lines[1], f"{1:6.0%} {total / 1e9:11.6f} {'':11} {calls:9d} {errors:9d} total"]
    return lines


def percentile_table(rows: Sequence[CallStatistics], floor_ns: int) -> list[str]:
    """Return percentiles of each system call in microseconds; the tracer's own share of each is named."""
    heads = "".join(f"{f'P{share * 100:g}':>10}" for share in _PERCENTILES)
    lines = [f"{'syscall':<18}{'calls':>9}{'mean':>10}{heads}{'max':>11}   (µs)"]
    for row in rows:
        values = "".join(f"{row.percentile_ns(share) / 1e3:10.1f}" for share in _PERCENTILES)
        mean = row.total_ns / row.calls / 1e3
        lines.append(f"{row.name:<18}{row.calls:>9}{mean:10.1f}{values}{row.max_ns / 1e3:11.1f}")
    if floor_ns:
        lines.append(f"A call that does nothing takes {floor_ns / 1e3:.1f} µs under this tracer.")
    return lines


def graph_table(edges: Iterable[tuple[str, str, int, int]], *, top: int = _GRAPH_ROWS) -> list[str]:
    """Return the edges of the call graph, most expensive first."""
    lines = ["Call graph (caller -> callee, system calls, time):"]
    for caller, callee, calls, ns in list(edges)[:top]:
        lines.append(f"  {caller} -> {callee}  {calls:,}  {duration(ns)}")
    return lines


def call_line(call: SystemCall, *, with_source: bool, with_time: bool) -> str:
    """Return one call as strace would print it, with the line that made it: read(3, 0x7f…, 64) = 64 [x.py:42 in f]."""
    arguments = ", ".join(_argument(number) for number in call.arguments[:3]) or (call.path or "")
    result = "?" if call.result is None else f"-1 {call.error}" if call.error else f"{call.result}"
    time = f" <{call.duration_ns / 1e9:.6f}>" if with_time and call.duration_ns is not None else ""
    path = f" {call.path}" if call.path and call.arguments else ""
    source = ""
    if with_source and call.stack:
        frame = next((frame for frame in call.stack if frame.line), call.stack[0])
        source = f"  [{os.path.basename(frame.file)}:{frame.line} in {frame.function}]"  # noqa: PTH119
    return f"{call.name}({arguments}) = {result}{time}{path}{source}"


def _argument(number: int) -> str:
    if number >= 1 << 63:
        return str(number - (1 << 64))
    if number & 0xFFFFFFFF == 0xFFFFFF9C:
        return "AT_FDCWD"
    return str(number) if number < 1 << 24 else f"{number:#x}"
