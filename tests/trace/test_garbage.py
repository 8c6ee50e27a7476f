"""Collections that take time become spans."""

import gc

import pytest

from entrenar.trace.durations import GARBAGE
from entrenar.trace.garbage import NAME, watch


class Recorded:
    def __init__(self):
        self.spans = []

    def start(self, parent, name, at_ns=None):
        self.spans.append([parent, name, at_ns])
        return len(self.spans) - 1

    def end(self, number, at_ns=None, *, attributes=None):
        self.spans[number] += [at_ns, attributes]


@pytest.mark.parametrize(("took_ns", "count"), [(999_999, 0), (1_000_000, 1)])
def test_a_collection_of_a_millisecond_is_a_span(took_ns, count):
    """Shorter ones are left out; the span has the collector's own figures and the parent of that moment."""
    times = iter([5000, 5000 + took_ns])
    recorded = Recorded()
    stop = watch(recorded, lambda: 42, clock=lambda: next(times))
    gc.disable()
    try:
        gc.collect()
    finally:
        stop()
        gc.enable()
    assert len(recorded.spans) == count
    for parent, name, started, ended, attributes in recorded.spans:
        assert (parent, name, started, ended) == (42, NAME, 5000, 5000 + took_ns)
        assert attributes["gc.generation"] == 2
        assert attributes["gc.collected"] >= 0
    assert NAME in GARBAGE


def test_the_watch_ends():
    """Nothing of it is left in the interpreter."""
    before = list(gc.callbacks)
    watch(Recorded(), lambda: 0)()
    assert gc.callbacks == before
