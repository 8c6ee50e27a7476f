"""Time the phases of a step: seconds for each, and an OpenTelemetry span around it.

    train > epoch > step > data, forward_pass, backward_pass, optimizer_step, checkpoint, eval

Only the API is called, so a span costs about a microsecond until someone installs an SDK. A phase on a GPU ends when
the device has done its work; otherwise only the time to queue it would count.
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


class Phases:
    """Adds up the seconds of the phases of one step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tracer = trace.get_tracer("entrenar.train")
        self._seconds: defaultdict[str, float] = defaultdict(float)
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
        started = time.perf_counter()
        with self._tracer.start_as_current_span(_SPAN_NAMES.get(name, name), attributes={"entrenar.step": step}):
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
