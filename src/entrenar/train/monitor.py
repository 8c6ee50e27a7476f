"""Training alarms: a step that looks wrong leaves an event or stops the run.

They are *andon cords*, after the cord with which any worker on an assembly line can stop it.

    cord             pulled when                                                               seen
    non_finite       the loss or the gradient norm is NaN or infinite                          before the weights move
    loss_spike       the loss lies far above its window's median, in robust deviations         before the weights move
    gradient_spike   the same for the gradient norm                                            before the weights move
    dead_gradient    the gradient norm has been (almost) zero for several steps                before the weights move
    plateau          the newer half of the window is no better than the older half             after the step
    throughput_drop  targets per second stay far below the window's median                     after the step

A cord leaves an event; `non_finite` and those listed in `halt_on` also stop the run. The windows never hold the
sample they judge, and they are saved in the checkpoint, so a resumed run judges exactly as one that was never
stopped.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from entrenar.runs import Event
from entrenar.stats import robust_z

Cord = Literal["loss_spike", "gradient_spike", "dead_gradient", "plateau", "throughput_drop"]


class MonitorConfig(BaseModel):
    """When training alarms go off, and which of them stop the run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    halt_on: tuple[Cord, ...] = ()
    """Alarms that stop the run; the others leave an event. A non-finite step always stops it, see max_skipped_steps."""
    max_skipped_steps: int = Field(default=0, ge=0)
    """Non-finite steps in a row to skip, without moving a weight, before the run stops."""
    monitor_window: int = Field(default=64, ge=8)
    """Past steps that a value is compared with; judging starts when half of them exist."""
    spike_z: float = Field(default=6.0, gt=0.0)
    """Robust deviations above the median that count as a spike."""
    plateau_steps: int = Field(default=1000, ge=16)
    """Steps over which the loss must fall."""
    plateau_min_drop: float = Field(default=1e-3, ge=0.0)
    """Fraction by which the median loss must fall from the older to the newer half of `plateau_steps`."""
    dead_gradient_norm: float = Field(default=1e-8, ge=0.0)
    """Gradient norms up to this count as dead."""
    dead_gradient_steps: int = Field(default=5, ge=1)
    """Steps in a row with a dead gradient before the alarm."""
    throughput_drop: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Fraction of the usual targets per second that counts as a drop."""
    throughput_drop_steps: int = Field(default=5, ge=1)
    """Steps in a row with a drop before the alarm."""


class Monitor:
    """Judges each step against the ones before it."""

    def __init__(self, config: MonitorConfig) -> None:
        self.config = config
        self._windows = {
            "loss": deque[float](maxlen=config.monitor_window),
            "grad_norm": deque[float](maxlen=config.monitor_window),
            "rate": deque[float](maxlen=config.monitor_window),
            "plateau": deque[float](maxlen=config.plateau_steps),
        }
        self._dead_steps = 0
        self._slow_steps = 0
        self._skipped_steps = 0

    def before_update(self, step: int, loss: float, grad_norm: float) -> list[Event]:
        """Judge a step before its weights move, and remember it if it is finite."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._skipped_steps += 1
            return [Event(step, "non_finite", f"loss is {loss}, gradient norm is {grad_norm}; no parameter was moved")]
        self._skipped_steps = 0
        events = [*self._spikes(step, {"loss": loss, "grad_norm": grad_norm}), *self._dead(step, grad_norm)]
        self._windows["loss"].append(loss)
        self._windows["grad_norm"].append(grad_norm)
        return events

    def after_step(self, step: int, loss: float, targets_per_s: float) -> list[Event]:
        """Judge a finished step, unless it was skipped; `targets_per_s` is its pace without the optimizer."""
        if not math.isfinite(loss):
            return []
        events = [*self._slow(step, targets_per_s), *self._stuck(step, loss)]
        self._windows["rate"].append(targets_per_s)
        return events

    def halts(self, event: Event) -> bool:
        """Return whether `event` stops the run."""
        if event.kind == "non_finite":
            return self._skipped_steps > self.config.max_skipped_steps
        return event.kind in self.config.halt_on

    def _is_armed(self, window: str) -> bool:
        return len(self._windows[window]) >= self.config.monitor_window // 2

    def _spikes(self, step: int, values: dict[str, float]) -> Iterator[Event]:
        for name, value in values.items():
            if not self._is_armed(name):
                continue
            deviations = robust_z(value, self._windows[name])
            if deviations > self.config.spike_z:
                usual = statistics.median(self._windows[name])
                kind = "loss_spike" if name == "loss" else "gradient_spike"
                yield Event(
                    step, kind, f"{name} {value:.4g} is {deviations:.1f} deviations above its usual {usual:.4g}"
                )

    def _dead(self, step: int, grad_norm: float) -> Iterator[Event]:
        self._dead_steps = self._dead_steps + 1 if grad_norm <= self.config.dead_gradient_norm else 0
        if self._dead_steps == self.config.dead_gradient_steps:
            yield Event(
                step,
                "dead_gradient",
                f"gradient norm at most {self.config.dead_gradient_norm:g} for {self._dead_steps} steps",
            )

    def _slow(self, step: int, rate: float) -> Iterator[Event]:
        usual = statistics.median(self._windows["rate"]) if self._is_armed("rate") else 0.0
        self._slow_steps = self._slow_steps + 1 if rate < self.config.throughput_drop * usual else 0
        if self._slow_steps == self.config.throughput_drop_steps:
            message = f"{rate:.1f} targets/s, usually {usual:.1f}, for {self._slow_steps} steps"
            yield Event(step, "throughput_drop", message)

    def _stuck(self, step: int, loss: float) -> Iterator[Event]:
        window = self._windows["plateau"]
        if len(window) == self.config.plateau_steps:
            half = self.config.plateau_steps // 2
            losses = list(window)
            older, newer = statistics.median(losses[:half]), statistics.median(losses[half:])
            window.clear()  # judged once; the next judgment needs a full window of new steps
            if newer > older * (1.0 - self.config.plateau_min_drop):
                yield Event(step, "plateau", f"median loss {newer:.4f} after {older:.4f} over {len(losses)} steps")
        window.append(loss)

    def state_dict(self) -> dict[str, Any]:
        """Return windows and counters as JSON values."""
        return {
            "windows": {name: list(window) for name, window in self._windows.items()},
            "dead_steps": self._dead_steps,
            "slow_steps": self._slow_steps,
            "skipped_steps": self._skipped_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore windows and counters."""
        for name, values in state["windows"].items():
            self._windows[name].clear()
            self._windows[name].extend(values)
        self._dead_steps = state["dead_steps"]
        self._slow_steps = state["slow_steps"]
        self._skipped_steps = state["skipped_steps"]
