"""Find the machine's effects on a run: time given to others, a quota, heat, and memory that creeps.

Memory is judged by the Theil-Sen slope (Sen 1968), the median of the slopes between readings, which a garbage
collection or one large batch does not move; the start of a run, when caches fill, is left out.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

from entrenar.trace.findings import Finding
from entrenar.trace.records import Metric

_FEWEST_READINGS = 12
_STEAL_PERCENT = 5.0
_THROTTLED_PERCENT = 5.0
_RUNQUEUE_PERCENT = 10.0
_GPU_THROTTLED_SHARE = 0.05
_START_SHARE = 1 / 3
_CREEP_RATIO = 0.02
_CREEP_BYTES = 16 << 20
_RISING_SHARE = 0.75
_MOST_READINGS = 300


def machine_findings(metrics: Iterable[Metric]) -> list[Finding]:
    """Return what the readings show."""
    series: defaultdict[str, list[Metric]] = defaultdict(list)
    for metric in metrics:
        series[metric.name].append(metric)
    found = [_stolen(series["steal_percent"]), _quota(series["throttled_percent"]), _queue(series["runqueue_percent"])]
    found += [_gpu(name, readings) for name, readings in series.items() if name.endswith(".throttled")]
    found.append(creeping(series["memory_bytes"], series["memory_available_bytes"]))
    return [finding for finding in found if finding is not None]


def _mean(readings: Sequence[Metric]) -> float:
    return statistics.fmean(reading.value for reading in readings) if readings else 0.0


def _stolen(readings: Sequence[Metric]) -> Finding | None:
    percent = _mean(readings)
    if percent < _STEAL_PERCENT:
        return None
    worst = max(reading.value for reading in readings)
    return Finding(
        "steal", f"The hypervisor gave {percent:.0f} % of the processors to other machines",
        (f"steal was {percent:.1f} % on average, {worst:.1f} % at worst, over {len(readings)} readings",),
        "use a machine with processors of its own, or compare runs by processor time", percent / 100,
    )  # fmt: skip


def _quota(readings: Sequence[Metric]) -> Finding | None:
    percent = _mean(readings)
    if percent < _THROTTLED_PERCENT:
        return None
    return Finding(
        "quota", f"The container's processor quota stopped the program for {percent:.0f} % of the time",
        (f"throttled_percent was {percent:.1f} on average over {len(readings)} readings",),
        "raise the quota (cpu.max), or set OMP_NUM_THREADS to the processors that the quota allows", percent / 100,
    )  # fmt: skip


def _queue(readings: Sequence[Metric]) -> Finding | None:
    percent = _mean(readings)
    if percent < _RUNQUEUE_PERCENT:
        return None
    return Finding(
        "run queue", f"The program waited {percent:.0f} % of the time for a free processor",
        (f"runqueue_percent was {percent:.1f} on average over {len(readings)} readings",),
        "stop what else runs on the machine, or use fewer threads and loader workers than there are processors",
        min(percent / 100, 1.0),
    )  # fmt: skip


def _gpu(name: str, readings: Sequence[Metric]) -> Finding | None:
    share = _mean(readings)
    if share < _GPU_THROTTLED_SHARE:
        return None
    device = name.removesuffix(".throttled")
    return Finding(
        "gpu throttled", f"{device} slowed down for heat or power {share:.0%} of the time",
        (f"{name} was set in {sum(reading.value > 0 for reading in readings)} of {len(readings)} readings",),
        f"look at {device}.temperature_c and {device}.power_w in the trace; check cooling and the power limit", share,
    )  # fmt: skip


def creeping(memory: Sequence[Metric], available: Sequence[Metric]) -> Finding | None:
    """Return a finding if memory rises steadily after the start of the run."""
    settled = _thinned(memory[int(len(memory) * _START_SHARE) :])
    if len(settled) < _FEWEST_READINGS:
        return None
    slopes = [
        (later.value - earlier.value) / (later.at_ns - earlier.at_ns)
        for index, earlier in enumerate(settled)
        for later in settled[index + 1 :]
        if later.at_ns > earlier.at_ns
    ]
    slope = statistics.median(slopes)
    grown = slope * (settled[-1].at_ns - settled[0].at_ns)
    usual = statistics.median(reading.value for reading in settled)
    rising = sum(value > 0 for value in slopes) / len(slopes)
    if grown < max(_CREEP_BYTES, _CREEP_RATIO * usual) or rising < _RISING_SHARE:
        return None
    per_hour = slope * 3.6e12
    evidence = [
        f"{settled[0].value / 2**20:,.0f} MiB became {settled[-1].value / 2**20:,.0f} MiB in "
        f"{(settled[-1].at_ns - settled[0].at_ns) / 1e9:,.0f} s: {per_hour / 2**20:,.0f} MiB an hour"
    ]
    if available:
        evidence.append(f"at this pace the machine's memory lasts {available[-1].value / per_hour:,.1f} hours more")
    return Finding(
        "memory", "Memory creeps up", tuple(evidence),
        "look for tensors kept from step to step (a loss that was never detached, a list of outputs, a growing cache)",
        0.0,
    )  # fmt: skip


def _thinned(readings: Sequence[Metric]) -> Sequence[Metric]:
    """Keep as many readings as all pairs can be looked at."""
    step = max(1, -(-len(readings) // _MOST_READINGS))
    return readings[::step]
