"""Name the rank that holds up the others, and the phase in which it does.

Ranks meet in collectives, so a slow one makes every step equally long on all: step times do not tell who it is. What
tells is the work between the collectives, where the slow rank takes longer, and the collectives themselves, where the
others wait for it. A rank is named only if it is the slowest in most steps and slower than the median by enough.
"""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from entrenar.trace.durations import COLLECTIVES, STRUCTURE

_MOST_STEPS = 0.6
_RATIO = 1.1
_FEWEST_STEPS = 10


@dataclass(frozen=True)
class Straggler:
    """The slow rank: in `phase` it takes `median_ns`, the others `others_ns`; it is the slowest in `share` of steps."""

    rank: int
    phase: str
    median_ns: float
    others_ns: float
    share: float
    excess_ns: int


def straggler(ranks: Mapping[int, Mapping[str, Sequence[int]]]) -> Straggler | None:
    """Return the rank that costs the others most, None if no rank is slow in a phase.

    `ranks` holds, by rank and phase, the duration of each step in nanoseconds.
    """
    phases = {phase for durations in ranks.values() for phase in durations}
    found = [one for phase in sorted(phases) if (one := _in_phase(phase, ranks)) is not None]
    return max(found, key=lambda one: one.excess_ns, default=None)


def _in_phase(phase: str, ranks: Mapping[int, Mapping[str, Sequence[int]]]) -> Straggler | None:
    if phase in COLLECTIVES or phase in STRUCTURE:
        return None
    series = {rank: durations[phase] for rank, durations in ranks.items() if phase in durations}
    steps = min(map(len, series.values()), default=0)
    if len(series) < 2 or steps < _FEWEST_STEPS:
        return None
    slowest = Counter(max(series, key=lambda rank: series[rank][step]) for step in range(steps))
    rank, wins = slowest.most_common(1)[0]
    others = [statistics.median(series[other][:steps]) for other in series if other != rank]
    median_ns, others_ns = statistics.median(series[rank][:steps]), statistics.median(others)
    share = wins / steps
    if share < _MOST_STEPS or median_ns < _RATIO * others_ns:
        return None
    return Straggler(rank, phase, median_ns, others_ns, share, round((median_ns - others_ns) * steps))
