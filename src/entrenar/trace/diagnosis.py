"""Draw a person's conclusions from a trace: the largest cost in time, its evidence, and the next step.

Each check looks for one cause and returns findings or none. Those about the program come first, ordered by the share of
the run's time that they explain; those about the machine follow, as they make everything slow alike. A check stays
silent below its bound: a diagnosis that always finds something is not read twice.
"""

import statistics
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property

from entrenar.trace.anomaly import WAITS
from entrenar.trace.anomaly_report import place_of
from entrenar.trace.durations import (
    COLLECTIVES,
    DATA,
    GARBAGE,
    PHASES,
    SAVE,
    STRUCTURE,
    Durations,
    by_rank,
    family,
    gather,
)
from entrenar.trace.findings import Finding
from entrenar.trace.hot_paths import IDLE, responsible
from entrenar.trace.machine_checks import machine_findings
from entrenar.trace.reader import Reader
from entrenar.trace.records import Anomaly, Tally
from entrenar.trace.report_text import duration
from entrenar.trace.stragglers import straggler

_DATA_SHARE = 0.10
_SAVE_SHARE = 0.05
_OPERATION_SHARE = 0.15
_SIBLING_RATIO = 1.5
_SIBLING_SHARE = 0.02
_GARBAGE_SHARE = 0.02
_IO_SHARE = 0.05
_ANOMALY_SHARE = 0.01


@dataclass(frozen=True)
class _Trace:
    """The input of the checks, read once."""

    reader: Reader

    @cached_property
    def durations(self) -> dict[str, Durations]:
        return gather(self.reader.spans())

    @cached_property
    def tallies(self) -> list[Tally]:
        return list(self.reader.tallies())

    @cached_property
    def wall_ns(self) -> int:
        """The total time for shares: training's if its spans are there, so that imports do not dilute it."""
        for names in (("train",), ("step",), PHASES):
            total_ns = sum(one.total_ns for one in self.named(names))
            if total_ns > 0:
                return total_ns
        info = self.reader.info()
        return max((info.ended_ns or info.started_ns) - info.started_ns, 1)

    @cached_property
    def step_text(self) -> str:
        steps = self.durations.get("step")
        return "" if steps is None else f"; a step takes {duration(steps.median_ns)}"

    def named(self, names: Collection[str]) -> list[Durations]:
        return [one for name, one in self.durations.items() if name in names]

    def calls_in(self, names: Collection[str]) -> Iterator[str]:
        """Yield the two system calls, with their lines, that took most of the time of spans with these names."""
        totals: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        for tally in self.tallies:
            if tally.span_name is not None and tally.span_name in names:
                place = place_of(responsible(tally.stack)) if tally.stack else ""
                totals[tally.name, place][0] += tally.total_ns
                totals[tally.name, place][1] += tally.calls
        for (name, place), (total_ns, calls) in sorted(totals.items(), key=lambda item: -item[1][0])[:2]:
            yield f"in it: {name}, {duration(total_ns)} over {calls:,} calls {place}".rstrip()


def diagnose(reader: Reader) -> list[Finding]:
    """Return what stands out in a trace: about the program, the most costly first, then about the machine.

    Raises: FormatError for a damaged trace.
    """
    trace = _Trace(reader)
    checks = (_waiting_for_data, _slow_operations, _slow_siblings, _saves, _garbage, _slow_io, _slow_rank, _anomalies)
    found = [finding for check in checks for finding in check(trace)]
    return _by_share(found) + _by_share(machine_findings(reader.metrics()))


def _by_share(findings: list[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda finding: -finding.share)


def _waiting_for_data(trace: _Trace) -> Iterator[Finding]:
    for one in trace.named(DATA):
        share = one.total_ns / trace.wall_ns
        if share >= _DATA_SHARE:
            yield Finding(
                "data", f"Training waits for its data {share:.0%} of the time",
                (_figures(trace, one), *trace.calls_in(DATA)),
                "load ahead in a worker, make rows cheaper to prepare, or put the corpus on a faster disk",
                share, _spans(one),
            )  # fmt: skip


def _slow_operations(trace: _Trace) -> Iterator[Finding]:
    """Find the operation that takes most of its own time, if that is a good part of the run.

    Numbered layers are left out: they are the model, and it is no news that it takes its time.
    """
    layers = _numbered(trace)
    known = PHASES | STRUCTURE | COLLECTIVES | GARBAGE
    operations = [one for one in trace.durations.values() if one.name not in known and family(one.name) not in layers]
    one = max(operations, key=lambda one: one.own_ns, default=None)
    share = 0.0 if one is None else one.own_ns / trace.wall_ns
    if one is not None and share >= _OPERATION_SHARE:
        figures = f"{duration(one.own_ns)} of its own in {len(one.all_ns):,} spans{trace.step_text}"
        yield Finding(
            "operation", f"{one.name} takes {share:.0%} of the time", (figures, *trace.calls_in([one.name])),
            f"make {one.name} faster, or call it less: no other operation is worth as much", share, _spans(one),
        )  # fmt: skip


def _numbered(trace: _Trace) -> dict[str, list[Durations]]:
    """Return the families of three or more numbered spans: the layers of a model."""
    groups: defaultdict[str, list[Durations]] = defaultdict(list)
    for name, one in trace.durations.items():
        if family(name) != name:
            groups[family(name)].append(one)
    return {kind: members for kind, members in groups.items() if len(members) >= 3}


def _slow_siblings(trace: _Trace) -> Iterator[Finding]:
    """Find one layer that is slower than the others of its kind."""
    for kind, members in _numbered(trace).items():
        usual_ns = statistics.median(one.median_ns for one in members)
        worst = max(members, key=lambda one: one.median_ns)
        share = (worst.median_ns - usual_ns) * len(worst.all_ns) / trace.wall_ns
        if worst.median_ns >= _SIBLING_RATIO * usual_ns and share >= _SIBLING_SHARE:
            yield Finding(
                "sibling", f"{worst.name} is {worst.median_ns / usual_ns:.1f} times as slow as its siblings",
                (f"{duration(worst.median_ns)} against {duration(usual_ns)} (medians of {len(members)} {kind})",
                 *trace.calls_in([worst.name])),
                f"compare its shapes, dtype and hooks with those of another {kind}", share, _spans(worst),
            )  # fmt: skip


def _saves(trace: _Trace) -> Iterator[Finding]:
    for one in trace.named(SAVE):
        share = one.total_ns / trace.wall_ns
        if share >= _SAVE_SHARE:
            yield Finding(
                "save", f"Saving checkpoints takes {share:.0%} of the time",
                (_figures(trace, one), *trace.calls_in(SAVE)),
                "save less often, in the background, or to a faster disk", share, _spans(one),
            )  # fmt: skip


def _garbage(trace: _Trace) -> Iterator[Finding]:
    for one in trace.named(GARBAGE):
        share = one.total_ns / trace.wall_ns
        if share >= _GARBAGE_SHARE:
            yield Finding(
                "garbage", f"Garbage collection takes {share:.0%} of the time", (_figures(trace, one),),
                "call gc.freeze() after the start, and gc.collect() at checkpoints only", share, _spans(one),
            )  # fmt: skip


def _slow_io(trace: _Trace) -> Iterator[Finding]:
    """Find the function whose input and output takes long, outside of loading data and saving.

    In a program with phases, what it does outside of them (imports, mostly) is no part of the time that shares are of.
    """
    totals: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    elsewhere = DATA | SAVE | {IDLE} | ({None} if trace.named(PHASES) else set())
    for tally in trace.tallies:
        if tally.stack and tally.span_name not in elsewhere and tally.name not in WAITS:
            frame = responsible(tally.stack)
            row = totals[f"{frame.function} ({frame.file.rpartition('/')[2]})"]
            row[0] += tally.total_ns
            row[1] += tally.calls
            row[2] += tally.slow
    name, (total_ns, calls, slow) = max(totals.items(), key=lambda item: item[1][0], default=("", [0, 0, 0]))
    share = total_ns / trace.wall_ns
    if share >= _IO_SHARE and slow:
        yield Finding(
            "io", f"{name} spends {share:.0%} of the time in system calls",
            (f"{duration(total_ns)} over {calls:,} calls, {slow:,} of them longer than 1 ms",),
            "open the function in the viewer; read larger blocks, keep files open, or cache what it reads", share,
        )  # fmt: skip


def _slow_rank(trace: _Trace) -> Iterator[Finding]:
    slow = straggler(by_rank(trace.reader.spans(), trace.reader.processes()))
    if slow is None:
        return
    share = min(slow.excess_ns / trace.wall_ns, 1.0)
    medians = f"{duration(slow.median_ns)} against {duration(slow.others_ns)} (medians)"
    yield Finding(
        "rank", f"Rank {slow.rank} holds up the others in {slow.phase}",
        (f"{medians}; it is the slowest in {slow.share:.0%} of the steps",),
        f"look at the machine of rank {slow.rank}: clocks, neighbors, disk; then at how rows are shared out", share,
    )  # fmt: skip


def _anomalies(trace: _Trace) -> Iterator[Finding]:
    found = list(trace.reader.anomalies())
    for shift in (one for one in found if one.kind == "shift"):
        yield Finding(
            "shift", f"{shift.operation} became slower at {_after(trace, shift)} and stayed so",
            (f"from {duration(shift.baseline_ns)} to {duration(shift.duration_ns)} {_place(shift)}".rstrip(),),
            "look at what else began at that time: the system's metrics are in the trace", 0.0, _span(shift),
        )  # fmt: skip
    high = [one for one in found if one.kind == "point" and one.severity == "high"]
    share = sum(one.duration_ns - one.baseline_ns for one in high) / trace.wall_ns
    if share >= _ANOMALY_SHARE:
        worst = max(high, key=lambda one: one.duration_ns)
        yield Finding(
            "anomalies", f"{len(high):,} calls or blocks were far slower than their like",
            (f"worst: {worst.operation}, {duration(worst.duration_ns)} against {duration(worst.baseline_ns)}, at "
             f"{_after(trace, worst)} {_place(worst)}".rstrip(),),
            "see them with `entrenar trace anomalies`; on a shared machine, compare with runqueue_percent", share,
            _span(worst),
        )  # fmt: skip


def _figures(trace: _Trace, one: Durations) -> str:
    return (
        f"{duration(one.total_ns)} in {len(one.all_ns):,} spans, {duration(one.median_ns)} each (median), "
        f"{duration(one.examples()[0][0])} at most{trace.step_text}"
    )


def _spans(one: Durations) -> tuple[int, ...]:
    return tuple(number for _, number in one.examples())


def _span(anomaly: Anomaly) -> tuple[int, ...]:
    return () if anomaly.span is None else (anomaly.span,)


def _place(anomaly: Anomaly) -> str:
    return "" if anomaly.frame is None else place_of(anomaly.frame)


def _after(trace: _Trace, anomaly: Anomaly) -> str:
    return duration(max(anomaly.at_ns - trace.reader.info().started_ns, 0))
