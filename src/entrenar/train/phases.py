"""Time the phases of a step: seconds for each, and an OpenTelemetry span around it.

Only the API is called, so a span costs about a microsecond until someone installs an SDK. A phase on a GPU ends when
the device has done its work; otherwise only the time to queue it would count.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from opentelemetry import trace


class Phases:
    """Adds up the seconds of the phases of one step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tracer = trace.get_tracer("entrenar.train")
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str, step: int) -> Iterator[None]:
        """Time the block as phase `name` of `step`."""
        started = time.perf_counter()
        with self._tracer.start_as_current_span(name, attributes={"entrenar.step": step}):
            try:
                yield
                if self._device.type != "cpu":
                    torch.accelerator.synchronize(self._device)
            finally:
                self._seconds[name] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Return the seconds by phase since the last call, and start again from zero."""
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds
