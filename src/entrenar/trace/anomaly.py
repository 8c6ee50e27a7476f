"""Find system calls, compute blocks and steps that take far longer than their like, while the program runs.

A duration is judged on a logarithmic scale against the median and the median absolute deviation of earlier events of
the same key (name, target, size to the nearest power of two). Three conditions must hold, because each alone cries
wolf on a shared machine: z above the threshold, a multiple of the median, and an absolute excess.

- The event under test is never in its own baseline, and an outlier enters the baseline clipped, so that a burst does
  not hide itself (Grubbs 1969 on masking).
- The first `WARM_UP` events of a key are learned, not judged; the report counts them.
- When more than half of the last `RECENT` events of a key lie at a new level, that is one `Shift`, not an endless row
  of anomalies: the new level becomes the baseline, and the shift ends when the old level is back.
- Only slow events are anomalies; a fast one is none.

Cost: a few µs an event (`benchmarks/trace_detectors.py`), because median and deviation are refreshed every `REFRESH`
events only.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from entrenar.errors import ConfigError
from entrenar.stats import RunningStats, median_and_mad
from entrenar.trace.durations import PHASES, STRUCTURE, kind_of
from entrenar.trace.records import Anomaly, Frame, Severity, Span, SystemCall

WARM_UP = 32
RING = 256
REFRESH = 16
RECENT = 32
MAX_KEYS = 4096
# A key whose durations are all alike would otherwise turn the last digit into an outlier: ten percent of its size.
_SPREAD_FLOOR = 0.1
# How far above the median, in spreads, an outlier enters the baseline.
_CLIP = 5.0
_MAD_TO_SIGMA = 1.4826
METHODS = ("robust", "zscore")
# Calls whose purpose is to wait: how long they take says what the program waited for, not that the call was slow.
WAITS = frozenset((
    "accept", "accept4", "clock_nanosleep", "epoll_pwait", "epoll_pwait2", "epoll_wait", "futex", "futex_waitv",
    "futex_wait", "io_getevents", "io_pgetevents", "io_uring_enter", "msgrcv", "mq_timedreceive", "nanosleep", "pause",
    "poll", "ppoll", "pselect6", "restart_syscall", "rt_sigsuspend", "rt_sigtimedwait", "select", "semtimedop",
    "wait4", "waitid",
))  # fmt: skip


MEDIUM_SIGMA = 4.0
HIGH_SIGMA = 5.0


def severity_of(sigma: float) -> Severity:
    """Return the specification's band of `sigma`: low up to 4, medium up to 5, high above."""
    if sigma > HIGH_SIGMA:
        return "high"
    return "medium" if sigma > MEDIUM_SIGMA else "low"


@dataclass(frozen=True, slots=True)
class Event:
    """One finished system call, compute block or step phase, with what a reader wants to know if it is slow.

    `target` is the class of file or peer, `size` the bytes moved (or the elements of a block), `waited_ns` the part of
    the duration that the thread waited for a processor. `is_phase` is for a step and its phases, which repeat the same
    work.
    """

    operation: str
    duration_ns: int
    at_ns: int = 0
    target: str = ""
    size: int = 0
    waited_ns: int = 0
    pid: int | None = None
    tid: int | None = None
    span: int | None = None
    frame: Frame | None = None
    path: str | None = None
    is_phase: bool = False

    @property
    def key(self) -> tuple[str, str, int]:
        """The events that this one is compared with."""
        return (self.operation, self.target, self.size.bit_length())


def event_of_call(call: SystemCall) -> Event | None:
    """Return what the detector needs of a system call; None for one that never returned or that waits on purpose."""
    if call.duration_ns is None or call.name in WAITS:
        return None
    return Event(
        call.name, call.duration_ns, call.start_ns, file_class(call.path or ""), call.size_bytes or 0,
        pid=call.pid, tid=call.tid, span=call.span, frame=call.stack[0] if call.stack else None, path=call.path,
    )  # fmt: skip


def event_of_span(span: Span) -> Event | None:
    """Return what the detector needs of a compute block or a phase; None for one that never ended."""
    if span.end_ns is None:
        return None
    name = kind_of(span.name)
    return Event(
        name, span.end_ns - span.start_ns, span.start_ns, pid=span.pid, tid=span.tid, span=span.id,
        is_phase=name in PHASES or name in STRUCTURE,
    )  # fmt: skip


@dataclass(slots=True)
class Shift:
    """The typical duration of a key moved from one level to another and stayed.

    `events` counts those at the new level; `ended_ns` is None while it lasts.
    """

    began: Anomaly
    events: int
    ended_ns: int | None = None


@dataclass(frozen=True)
class Sensitivity:
    """Thresholds for a slow event: σ of log duration, times the median, and µs above it; the same for level shifts.

    Raises: ConfigError for a threshold, ratio or excess that is not positive.
    """

    threshold: float = 3.0
    ratio: float = 3.0
    excess_us: float = 200.0
    shift_ratio: float = 2.0
    shift_excess_us: float = 50.0

    def __post_init__(self) -> None:
        for name in ("threshold", "excess_us", "shift_excess_us"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"anomaly {name} must be > 0, got {getattr(self, name)}")
        for name in ("ratio", "shift_ratio"):
            if not getattr(self, name) > 1:
                raise ConfigError(f"anomaly {name} must be > 1, got {getattr(self, name)}")


CALLS = Sensitivity()
# Steps and phases repeat the same work: half as much again, and 2 ms, is already news.
STEPS = Sensitivity(ratio=1.5, excess_us=2000.0, shift_ratio=1.25, shift_excess_us=2000.0)


@dataclass(slots=True)
class _Robust:
    """Median and spread of the logarithms of the last `RING` durations of one key, outliers clipped."""

    ring: deque[float] = field(default_factory=lambda: deque(maxlen=RING))
    seen: int = 0
    center: float = 0.0
    spread: float = _SPREAD_FLOOR

    def add(self, logarithm: float) -> None:
        if self.seen >= WARM_UP:
            logarithm = min(logarithm, self.center + _CLIP * self.spread)
        self.ring.append(logarithm)
        self.seen += 1
        if self.seen >= WARM_UP and self.seen % REFRESH == 0:
            self._refresh()

    def restart(self, logarithms: list[float]) -> None:
        """Take a new level as the baseline."""
        self.ring.clear()
        self.ring.extend(logarithms)
        self._refresh()

    def _refresh(self) -> None:
        self.center, mad = median_and_mad(self.ring)
        self.spread = max(_MAD_TO_SIGMA * mad, _SPREAD_FLOOR)

    def judge(self, logarithm: float) -> tuple[float, float]:
        """Return σ above the median, and the median in ns."""
        return (logarithm - self.center) / self.spread, math.exp(self.center)


@dataclass(slots=True)
class _ZScore:
    """Mean and standard deviation of the last 100 durations, the event under test left out: the classic, to compare."""

    ring: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    seen: int = 0

    def add(self, logarithm: float) -> None:
        self.ring.append(math.exp(logarithm))
        self.seen += 1

    def restart(self, logarithms: list[float]) -> None:
        """Take a new level as the baseline."""
        self.ring.clear()
        self.ring.extend(math.exp(value) for value in logarithms)

    def judge(self, logarithm: float) -> tuple[float, float]:
        """Return σ above the mean, and the mean in ns."""
        stats = RunningStats()
        for value in self.ring:
            stats.add(value)
        spread = max(stats.deviation, _SPREAD_FLOOR * stats.mean)
        return (math.exp(logarithm) - stats.mean) / spread, stats.mean


@dataclass(slots=True)
class _Level:
    """Counts how many of the last `RECENT` events lie above, or below, the level that the baseline holds."""

    recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=RECENT))
    above: int = 0
    below: int = 0
    open: list[Shift] = field(default_factory=list)

    def add(self, logarithm: float, side: int) -> None:
        """Note one event; `side` is +1 above the level, -1 below, 0 at it."""
        if len(self.recent) == RECENT:
            self._count(self.recent[0][1], -1)
        self.recent.append((logarithm, side))
        self._count(side, 1)

    def _count(self, side: int, change: int) -> None:
        if side > 0:
            self.above += change
        elif side < 0:
            self.below += change

    def moved(self) -> list[float]:
        """Return the logarithms at the new level once more than half of the recent events are there, else nothing."""
        for count, wanted in ((self.above, 1), (self.below, -1)):
            if count > RECENT // 2:
                return [value for value, side in self.recent if side == wanted]
        return []

    def restart(self) -> None:
        self.recent.clear()
        self.above = self.below = 0


@dataclass(slots=True)
class _Key:
    baseline: _Robust | _ZScore
    level: _Level = field(default_factory=_Level)


class Detector:
    """Judge events one by one as they end; keep the anomalies and the population they were found in.

    `on_high` is called with each High anomaly at once, in the caller's thread: it must not block.
    """

    def __init__(
        self,
        sensitivity: Sensitivity = CALLS,
        *,
        phases: Sensitivity = STEPS,
        method: str = "robust",
        on_high: Callable[[Anomaly], None] | None = None,
        keep: int = 10_000,
    ) -> None:
        """Begin with no baseline. `keep` bounds the anomalies held in memory; all are counted.

        `phases` is the sensitivity for steps and their phases; `sensitivity` also sets its threshold.

        Raises: ConfigError for an unknown method.
        """
        if method not in METHODS:
            raise ConfigError(f"the anomaly method must be one of {', '.join(METHODS)}, got {method!r}")
        self.sensitivity = sensitivity
        self._phases = replace(phases, threshold=sensitivity.threshold)
        self.method = method
        self.anomalies: deque[Anomaly] = deque(maxlen=keep)
        self.shifts: deque[Shift] = deque(maxlen=keep)
        self.counts: dict[Severity, int] = {"low": 0, "medium": 0, "high": 0}
        self.judged = 0
        self.learned = 0
        self._on_high = on_high
        self._keys: dict[tuple[str, str, int], _Key] = {}

    def see(self, event: Event) -> Anomaly | None:
        """Judge one event against its past, then add it to that past; return what is wrong with it, if anything.

        A shift of the level is returned as well, once, by the event that completes it.
        """
        key = self._key(event)
        duration_ns = max(event.duration_ns - event.waited_ns, 1)
        logarithm = math.log(duration_ns)
        if key.baseline.seen < WARM_UP:
            self.learned += 1
            key.baseline.add(logarithm)
            return None
        self.judged += 1
        sigma, baseline_ns = key.baseline.judge(logarithm)
        found = self._point(event, duration_ns, baseline_ns, sigma)
        key.baseline.add(logarithm)
        key.level.add(logarithm, _side(duration_ns, baseline_ns, self._wanted(event)))
        shift = self._shift(key, event, baseline_ns)
        if found is not None:
            self.anomalies.append(found)
            self.counts[found.severity] += 1
            if found.severity == "high" and self._on_high is not None:
                self._on_high(found)
        return shift or found

    def see_all(self, events: Iterable[Event]) -> list[Anomaly]:
        """Judge a sequence; return its anomalies in order."""
        return [found for event in events if (found := self.see(event)) is not None]

    def _wanted(self, event: Event) -> Sensitivity:
        return self._phases if event.is_phase else self.sensitivity

    def _key(self, event: Event) -> _Key:
        key = self._keys.get(event.key)
        if key is None:
            # A program that opens files without end must not grow the tracer: beyond the bound, names alone.
            name = event.key if len(self._keys) < MAX_KEYS else (event.operation, "", 0)
            key = self._keys.setdefault(name, _Key(_Robust() if self.method == "robust" else _ZScore()))
        return key

    def _point(self, event: Event, duration_ns: float, baseline_ns: float, sigma: float) -> Anomaly | None:
        wanted = self._wanted(event)
        is_far = sigma > wanted.threshold
        if is_far and self.method == "robust":
            excess_ns = duration_ns - baseline_ns
            is_far = duration_ns >= wanted.ratio * baseline_ns and excess_ns >= wanted.excess_us * 1e3
        return _anomaly(event, "point", event.duration_ns, baseline_ns, sigma) if is_far else None

    def _shift(self, key: _Key, event: Event, baseline_ns: float) -> Anomaly | None:
        level = key.level
        for shift in level.open:
            shift.events += 1
        moved = level.moved()
        if not moved:
            return None
        new_ns = math.exp(sorted(moved)[len(moved) // 2])
        began = None
        if new_ns > baseline_ns:
            began = _anomaly(event, "shift", round(new_ns), baseline_ns, key.baseline.judge(math.log(new_ns))[0])
            level.open.append(Shift(began, events=len(moved)))
            self.shifts.append(level.open[-1])
        else:
            level.open = [shift for shift in level.open if not _is_back(shift, new_ns, event, len(moved))]
        level.restart()
        key.baseline.restart(moved)
        return began


def _is_back(shift: Shift, new_ns: float, event: Event, moved: int) -> bool:
    """End a shift if the new level is nearer to where it began than to where it went, on a logarithmic scale."""
    if new_ns * new_ns > float(shift.began.baseline_ns) * shift.began.duration_ns:
        return False
    shift.ended_ns = event.at_ns
    shift.events = max(shift.events - moved, 1)
    return True


def _anomaly(
    event: Event, kind: Literal["point", "shift"], duration_ns: int, baseline_ns: float, sigma: float
) -> Anomaly:
    return Anomaly(
        event.operation, kind, event.at_ns, duration_ns, round(baseline_ns), sigma, severity_of(sigma),
        event.pid, event.tid, event.span, event.frame, event.path,
    )  # fmt: skip


def _side(duration_ns: float, baseline_ns: float, wanted: Sensitivity) -> int:
    slower, faster = max(duration_ns, baseline_ns), min(duration_ns, baseline_ns)
    if slower < wanted.shift_ratio * faster or slower - faster < wanted.shift_excess_us * 1e3:
        return 0
    return 1 if duration_ns > baseline_ns else -1


def file_class(path: str) -> str:
    """Return the kind of file behind a descriptor, so that reads of a corpus are not compared with those of a pipe."""
    for prefix, kind in (("socket:", "socket"), ("pipe:", "pipe"), ("anon_inode:", "anonymous"), ("/dev/", "device")):
        if path.startswith(prefix):
            return kind
    if path.startswith(("/proc/", "/sys/")):
        return "kernel"
    name = path.rpartition("/")[2]
    dot = name.rfind(".")
    return name[dot:] if dot > 0 else ("file" if name else "")
