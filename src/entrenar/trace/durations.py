"""Gather the durations of each kind of span in one pass, for the diagnosis and the comparison of runs."""

import heapq
import re
import statistics
from array import array
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from entrenar.trace.records import Process, Span

# The names that `train` gives its phases; other programs may use them too.
DATA = frozenset(("data", "data_wait", "next_batch"))
SAVE = frozenset(("checkpoint", "save", "save_checkpoint"))
STRUCTURE = frozenset(("train", "epoch", "step"))
PHASES = DATA | SAVE | frozenset((
    "forward", "forward_pass", "backward", "backward_pass", "optimizer", "optimizer_step", "eval", "evaluate",
))  # fmt: skip
GARBAGE = frozenset(("gc", "garbage_collection"))
# A rank that arrives here early waits for the others: the one that waits least is the slow one.
COLLECTIVES = frozenset(("all_reduce", "all_gather", "reduce_scatter", "barrier", "broadcast"))
_SLOWEST = 3
_LAST_NUMBER = re.compile(r"[ _.]?\d+")


@dataclass
class Durations:
    """All finished spans of one name. Nanoseconds; `own_ns` leaves out what children cover, `slowest` is (ns, id)."""

    name: str
    all_ns: "array[int]" = field(default_factory=lambda: array("q"))
    own_ns: int = 0
    slowest: list[tuple[int, int]] = field(default_factory=list)

    def add(self, span: Span, duration_ns: int) -> None:
        """Take one more span into account."""
        self.all_ns.append(duration_ns)
        self.own_ns += duration_ns
        heapq.heappush(self.slowest, (duration_ns, span.id))
        if len(self.slowest) > _SLOWEST:
            heapq.heappop(self.slowest)

    @property
    def total_ns(self) -> int:
        """Sum over all spans of the name."""
        return sum(self.all_ns)

    @property
    def median_ns(self) -> float:
        """Median."""
        return statistics.median(self.all_ns)

    def examples(self) -> list[tuple[int, int]]:
        """Return (nanoseconds, span id) of the slowest spans, slowest first."""
        return sorted(self.slowest, reverse=True)


def gather(spans: Iterable[Span]) -> dict[str, Durations]:
    """Return the durations by name of span; leave out spans that never ended and those of a whole process."""
    by_name: dict[str, Durations] = {}
    names: dict[int, str] = {}
    covered: defaultdict[int, int] = defaultdict(int)
    for span in spans:
        duration_ns = span.duration_ns
        if duration_ns is None or span.name.startswith("process:"):
            continue
        name = kind_of(span.name)
        names[span.id] = name
        by_name.setdefault(name, Durations(name)).add(span, duration_ns)
        if span.parent is not None:
            covered[span.parent] += duration_ns
    for number, covered_ns in covered.items():
        if number in names:
            by_name[names[number]].own_ns -= covered_ns
    return by_name


def kind_of(name: str) -> str:
    """Return `step` for "step 17", so that all steps are one kind; layers keep their numbers."""
    head, _, number = name.partition(" ")
    return head if head in STRUCTURE and number.isdigit() else name


def family(name: str) -> str:
    """Return what siblings share: `attention_layer` of "attention_layer_3"."""
    return _LAST_NUMBER.sub("", name)


def by_rank(spans: Iterable[Span], processes: Iterable[Process]) -> dict[int, dict[str, list[int]]]:
    """Return durations in nanoseconds by rank and name, in order of time; processes without a rank are left out."""
    ranks = {process.pid: process.rank for process in processes if process.rank is not None}
    found: dict[int, dict[str, list[int]]] = {}
    for span in spans:
        rank = ranks.get(span.pid)
        if rank is not None and span.duration_ns is not None:
            found.setdefault(rank, {}).setdefault(kind_of(span.name), []).append(span.duration_ns)
    return found
