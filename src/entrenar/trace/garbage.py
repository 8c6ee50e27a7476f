"""Record garbage collections that take time as spans, so that a diagnosis can name them.

Python's collector stops the thread that happens to allocate; with many live objects a full collection takes tens of
milliseconds, at a step of its own choosing, and on a profile it looks like a slow operation.
"""

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

SHORTEST_NS = 1_000_000
NAME = "gc"


class Spans(Protocol):
    """The recorder methods that garbage spans need."""

    def start(self, parent: int, name: str, at_ns: int | None = None) -> int:
        """Begin a span; return its id."""

    def end(
        self, number: int, at_ns: int | None = None, *, status: int = 0, attributes: Mapping[str, Any] | None = None
    ) -> None:
        """End a span."""


def watch(
    spans: Spans, parent: Callable[[], int], *, clock: Callable[[], int] = time.monotonic_ns
) -> Callable[[], None]:
    """Record every collection of at least a millisecond under the span `parent()`; return what ends the watch."""
    started = 0

    def on_collection(phase: str, info: Mapping[str, int]) -> None:
        nonlocal started
        now = clock()
        if phase == "start":
            started = now
        elif now - started >= SHORTEST_NS:
            attributes = {f"gc.{key}": info[key] for key in ("generation", "collected") if key in info}
            spans.end(spans.start(parent(), NAME, started), now, attributes=attributes)

    gc.callbacks.append(on_collection)
    return lambda: gc.callbacks.remove(on_collection)
