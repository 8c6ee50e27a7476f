"""Compare two runs by phase and layer, system call and line, with noise taken into account.

Spans have a duration each, so their medians are compared with an interval: the moving-block bootstrap (Kuensch 1989)
draws whole stretches of neighboring spans, because a step resembles the one before it and single draws would call any
drift a change. System calls are kept as counts and histograms: their medians are exact to 9 %, the width of a bin, and
a change is told only if the count or the time moved by more than that, by more than chance, and by more than what an
empty call takes under the tracer.

A row is a change if its interval, at a level that is divided among all rows (Bonferroni), excludes equal times, the
ratio is at least `LEAST_RATIO`, and the time in question at least `LEAST_SHARE` of a run. How often two runs of the
same program show a change is measured in `benchmarks/trace_detectors.py`. A machine that was busier in one of the runs
is a real difference, though not one of the program, so the readings that show it are told as well.
"""

import math
import random
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from entrenar.trace.anomaly import WAITS
from entrenar.trace.durations import PHASES, STRUCTURE, Durations, gather
from entrenar.trace.hot_paths import IDLE, responsible
from entrenar.trace.reader import Reader
from entrenar.trace.records import Tally
from entrenar.trace.report_text import duration
from entrenar.trace.tally import merge, percentile

LEAST_RATIO = 1.05
LEAST_SHARE = 0.002
_LEVEL = 0.05
_DRAWS = 500
_FEWEST_SPANS = 8
_MOST_SPANS = 400
_BIN_RATIO = 2.0 ** (1 / 8)
# Readings of the machine that make a run slow, and from how many points of difference on they are told.
_MACHINE = ("runqueue_percent", "steal_percent", "throttled_percent", "iowait_percent")
_MACHINE_POINTS = 5.0
Level = Literal["phase", "block", "call", "line"]


@dataclass(frozen=True)
class Change:
    """One kind of span, system call or line in both runs.

    `before_ns` and `after_ns` are typical durations (medians), `ratio` is after to before with its interval; `total_ns`
    is how much more time the second run spent there. None where a run has none.
    """

    kind: Level
    name: str
    before_ns: float | None
    after_ns: float | None
    before_count: int
    after_count: int
    total_ns: int
    ratio: float | None
    low: float | None
    high: float | None
    is_change: bool


@dataclass(frozen=True)
class Comparison:
    """All rows that both runs, or one of them, have; `machine` holds readings (before, after) that differ much."""

    rows: Sequence[Change]
    wall_ns: int
    machine: Mapping[str, tuple[float, float]]

    @property
    def changes(self) -> list[Change]:
        """Return the rows beyond noise that matter, the largest difference in total time first."""
        least_ns = LEAST_SHARE * self.wall_ns
        found = [row for row in self.rows if row.is_change and abs(row.total_ns) >= least_ns]
        return sorted(found, key=lambda row: -abs(row.total_ns))


def compare(before: Reader, after: Reader, *, seed: int = 0) -> Comparison:
    """Compare two traces.

    Raises: FormatError for a damaged trace.
    """
    first, second = gather(before.spans()), gather(after.spans())
    names = sorted(first.keys() | second.keys())
    tallies = [list(reader.tallies()) for reader in (before, after)]
    calls, lines = (_grouped(tallies, key) for key in (_call_of, _line_of))
    tests = len(names) + len(calls) + len(lines)
    level = _LEVEL / max(tests, 1)
    generator = random.Random(seed)  # noqa: S311 - draws of a bootstrap
    rows = [_span_change(name, first.get(name), second.get(name), level, generator) for name in names]
    bounds = _Bounds(level, max(before.info().floor_ns, after.info().floor_ns))
    rows += [_call_change("call", name, pair, bounds) for name, pair in sorted(calls.items())]
    rows += [_call_change("line", name, pair, bounds) for name, pair in sorted(lines.items())]
    return Comparison(rows, max(_wall_ns(before), _wall_ns(after)), _machine(before, after))


def _wall_ns(reader: Reader) -> int:
    info = reader.info()
    return (info.ended_ns or info.started_ns) - info.started_ns


def _machine(before: Reader, after: Reader) -> dict[str, tuple[float, float]]:
    found = {}
    for name in _MACHINE:
        means = [
            statistics.fmean(values) if (values := [metric.value for metric in reader.metrics(name=name)]) else 0.0
            for reader in (before, after)
        ]
        if abs(means[1] - means[0]) >= _MACHINE_POINTS:
            found[name] = (means[0], means[1])
    return found


# ---- spans ----


def _span_change(
    name: str, first: Durations | None, second: Durations | None, level: float, generator: random.Random
) -> Change:
    before: Sequence[int] = first.all_ns if first is not None else ()
    after: Sequence[int] = second.all_ns if second is not None else ()
    low = high = ratio = None
    is_change = not before or not after
    if before and after:
        ratio = statistics.median(after) / max(statistics.median(before), 1.0)
        if min(len(before), len(after)) >= _FEWEST_SPANS:
            low, high = ratio_interval(before, after, level=level, generator=generator)
            is_change = (low > 1.0 and ratio >= LEAST_RATIO) or (high < 1.0 and ratio <= 1 / LEAST_RATIO)
    return Change(
        "phase" if name in PHASES | STRUCTURE else "block", name,
        statistics.median(before) if before else None, statistics.median(after) if after else None,
        len(before), len(after), sum(after) - sum(before), ratio, low, high, is_change,
    )  # fmt: skip


def ratio_interval(
    before: Sequence[int], after: Sequence[int], *, level: float, generator: random.Random
) -> tuple[float, float]:
    """Return an interval for the ratio of the medians that leaves out the true one with probability `level`."""
    logs = [[math.log(max(value, 1)) for value in _thinned(series)] for series in (before, after)]
    differences = sorted(_drawn_median(logs[1], generator) - _drawn_median(logs[0], generator) for _ in range(_DRAWS))
    # Beyond what the draws can resolve, the interval is widened by their deviation and Student's t for as many blocks
    # as there are, in its first-order expansion (Cornish & Fisher 1938).
    center = statistics.median(logs[1]) - statistics.median(logs[0])
    z = statistics.NormalDist().inv_cdf(1 - level / 2)
    freedom = math.sqrt(min(map(len, logs))) - 1
    normal = z * (1 + (z * z + 1) / (4 * freedom)) * statistics.pstdev(differences)
    at = int(level / 2 * _DRAWS)
    low = min(differences[at], center - normal)
    high = max(differences[-1 - at], center + normal)
    return math.exp(low), math.exp(high)


def _thinned(values: Sequence[int]) -> Sequence[int]:
    """Keep every n-th of very many spans: the median of hundreds is known well enough."""
    return values[:: -(-len(values) // _MOST_SPANS)]


def _drawn_median(values: Sequence[float], generator: random.Random) -> float:
    """Return the median of a resample of whole blocks of neighbors; a block is as long as the root of their number."""
    size = round(math.sqrt(len(values)))
    blocks = -(-len(values) // size)
    drawn: list[float] = []
    for _ in range(blocks):
        start = generator.randrange(len(values) - size + 1)
        drawn += values[start : start + size]
    return statistics.median(drawn[: len(values)])


# ---- system calls ----

_Pair = tuple[list[Tally], list[Tally]]


def _call_of(tally: Tally) -> str:
    return tally.name


def _line_of(tally: Tally) -> str:
    if not tally.stack:
        return ""
    frame = responsible(tally.stack)
    # The line number is left out: an edit above it would make every line below a new one.
    return f"{tally.name} in {frame.function} ({frame.file.rpartition('/')[2]})"


def _grouped(tallies: Sequence[Iterable[Tally]], key: Any) -> Mapping[str, _Pair]:
    groups: defaultdict[str, _Pair] = defaultdict(lambda: ([], []))
    for run, of_run in enumerate(tallies):
        for tally in of_run:
            name = key(tally)
            if name and tally.span_name != IDLE and tally.name not in WAITS:
                groups[name][run].append(tally)
    return groups


@dataclass(frozen=True)
class _Bounds:
    """When calls differ: at which level, and by how much, in nanoseconds, at least.

    What a call that does nothing takes under the tracer follows the machine's load, so that much is no change.
    """

    level: float
    floor_ns: int


def _call_change(kind: Level, name: str, pair: _Pair, bounds: _Bounds) -> Change:
    before, after = pair
    counts = [sum(tally.calls for tally in run) for run in (before, after)]
    totals = [sum(tally.total_ns for tally in run) for run in (before, after)]
    histograms = [merge([tally.histogram for tally in run]) for run in (before, after)]
    medians = [float(percentile(histogram, 0.5)) if histogram else None for histogram in histograms]
    ratio = medians[1] / max(medians[0], 1.0) if medians[0] is not None and medians[1] is not None else None
    moved = (
        medians[0] is not None
        and medians[1] is not None
        and abs(medians[1] - medians[0]) >= bounds.floor_ns
        and max(medians[0], medians[1]) >= _BIN_RATIO**2 * min(medians[0], medians[1])
        and _shifted(histograms[0], histograms[1], bounds.level)
    )
    return Change(
        kind, name, medians[0], medians[1], counts[0], counts[1], totals[1] - totals[0], ratio, None, None,
        moved or _beyond_chance(counts, bounds.level),
    )  # fmt: skip


def _beyond_chance(counts: Sequence[int], level: float) -> bool:
    """Return whether two counts differ by more than chance (Poisson, square roots) and by more than a tenth."""
    before, after = counts
    distance = 2 * abs(math.sqrt(after) - math.sqrt(before)) / math.sqrt(2)
    far = statistics.NormalDist().inv_cdf(1 - level / 2)
    return distance > far and abs(after - before) > 0.1 * max(before, after)


def _shifted(before: Mapping[int, int], after: Mapping[int, int], level: float) -> bool:
    """Return whether one histogram lies to one side of the other (Mann & Whitney 1947, ties by bins)."""
    n, m = sum(before.values()), sum(after.values())
    below = rank_sum = ties = 0.0
    for index in sorted(before.keys() | after.keys()):
        here_before, here_after = before.get(index, 0), after.get(index, 0)
        rank_sum += here_after * (below + here_before / 2)
        below += here_before
        ties += (here_before + here_after) ** 3 - (here_before + here_after)
    total = n + m
    variance = n * m / 12 * ((total + 1) - ties / (total * (total - 1))) if total > 1 else 0.0
    if variance <= 0:
        return False
    return abs(rank_sum - n * m / 2) / math.sqrt(variance) > statistics.NormalDist().inv_cdf(1 - level / 2)


# ---- what is told ----


def lines(comparison: Comparison, *, top: int = 20) -> list[str]:
    """Return the changes for a person."""
    changes = comparison.changes
    text = [f"Compared {len(comparison.rows)} kinds of spans, system calls and lines: {len(changes)} changed"]
    text += [f"  {row.kind:<5} {row.name}: {_moved(row)}" for row in changes[:top]]
    if len(changes) > top:
        text.append(f"  … and {len(changes) - top} more")
    text += [
        f"  The machine differed: {name} {before:.1f} -> {after:.1f}; times may have moved for that reason alone"
        for name, (before, after) in comparison.machine.items()
    ]
    return text


def _moved(row: Change) -> str:
    total = f"{'+' if row.total_ns >= 0 else '-'}{duration(abs(row.total_ns))} in all"
    if row.before_ns is None or not row.before_count:
        return f"new, {row.after_count:,} times, {total}"
    if row.after_ns is None or not row.after_count:
        return f"gone, it was there {row.before_count:,} times, {total}"
    interval = "" if row.low is None or row.high is None else f" ({row.low:.2f} to {row.high:.2f})"
    times = f"{row.before_count:,} -> {row.after_count:,} times, " if row.before_count != row.after_count else ""
    return (
        f"{duration(row.before_ns)} -> {duration(row.after_ns)}, {row.after_ns / max(row.before_ns, 1):.2f} times"
        f"{interval}, {times}{total}"
    )


def as_json(comparison: Comparison) -> list[dict[str, Any]]:
    """Return every row as plain values, durations in µs."""
    return [
        {
            "kind": row.kind,
            "name": row.name,
            "changed": row.is_change,
            "before_us": None if row.before_ns is None else row.before_ns / 1e3,
            "after_us": None if row.after_ns is None else row.after_ns / 1e3,
            "before_count": row.before_count,
            "after_count": row.after_count,
            "total_us": row.total_ns / 1e3,
            "ratio": row.ratio,
            "interval": None if row.low is None else [row.low, row.high],
        }
        for row in comparison.rows
    ]
