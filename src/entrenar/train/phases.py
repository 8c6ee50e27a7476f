"""Time the phases of a step: seconds for each, and an OpenTelemetry span around it.

    train > epoch > step > data, forward_pass, backward_pass, optimizer_step, checkpoint, eval

Only the API is called, so a span costs about a microsecond until someone installs an SDK. On a GPU a phase only queues
work, so it is timed by events that the device passes, and nobody waits for them: `take` returns the seconds of phases
that the device has left behind, and keeps the rest for the next call. Spans there show when the host queued the work;
the span of the step gets the device's seconds.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from opentelemetry import trace
from opentelemetry.trace import Span

from entrenar.runs import StepRecord

# Spans are called as the specification calls them; the keys of a record stay short.
_SPAN_NAMES = {
    "forward": "forward_pass", "backward": "backward_pass", "optimizer": "optimizer_step", "evaluate": "eval",
}  # fmt: skip


_Mark = float | torch.Event
"""A moment: of the host's clock, or of a device's queue."""


class Phases:
    """Adds up the seconds of the phases of one step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tracer = trace.get_tracer("entrenar.train")
        self._is_queued = device.type != "cpu"
        self._ended: list[tuple[str, _Mark, _Mark]] = []
        self._epoch: int | None = None
        self._epoch_span = ExitStack()

    @contextmanager
    def run(self, rank: int) -> Iterator[None]:
        """Hold the spans of the whole run and of its last epoch open."""
        with self._tracer.start_as_current_span("train", attributes={"entrenar.rank": rank}), self._epoch_span:
            yield

    @contextmanager
    def step(self, number: int, epoch: float | None) -> Iterator[Span]:
        """Hold the span of step `number` open; `epoch` is how many passes over the data lie before it."""
        passed = None if epoch is None else int(epoch)
        if passed is not None and passed != self._epoch:
            self._epoch_span.close()
            self._epoch = passed
            epoch_span = self._tracer.start_as_current_span("epoch", attributes={"entrenar.epoch": passed + 1})
            self._epoch_span.enter_context(epoch_span)
        with self._tracer.start_as_current_span("step", attributes={"entrenar.step": number}) as span:
            yield span

    @contextmanager
    def __call__(self, name: str, step: int) -> Iterator[None]:
        """Time the block as phase `name` of `step`."""
        started = self._mark()
        with self._tracer.start_as_current_span(_SPAN_NAMES.get(name, name), attributes={"entrenar.step": step}):
            try:
                yield
            finally:
                self._ended.append((name, started, self._mark()))

    def take(self) -> dict[str, float]:
        """Return the seconds by phase since the last call, of phases that are over, and start again from zero."""
        seconds: defaultdict[str, float] = defaultdict(float)
        waiting = []
        for name, start, end in self._ended:
            between_s = _seconds(start, end)
            if between_s is None:
                waiting.append((name, start, end))
            else:
                seconds[name] += between_s
        self._ended = waiting
        if self._is_queued:
            trace.get_current_span().set_attributes({f"entrenar.device_s.{name}": s for name, s in seconds.items()})
        return dict(seconds)

    def _mark(self) -> _Mark:
        if not self._is_queued:
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event


def _seconds(start: _Mark, end: _Mark) -> float | None:
    """Return the time between two moments; None if the device has not come to the second."""
    if isinstance(start, float) or isinstance(end, float):
        return float(end) - float(start)  # type: ignore[arg-type]  # both are of one clock
    return start.elapsed_time(end) / 1e3 if end.query() else None


def describe_step(span: Span, record: StepRecord, targets: int) -> None:
    """Put the figures of a step on its span; `targets` is the number that the step trained on."""
    span.set_attributes(
        {
            "entrenar.loss": record.loss,
            "entrenar.grad_norm": record.grad_norm,
            "entrenar.lr": record.lr,
            "entrenar.tokens": targets,
        }
    )
