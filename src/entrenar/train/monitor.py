"""Training alarms: a step that looks wrong leaves an event, and what is done about it is a matter of policy.

They are *andon cords*, after the cord with which any worker on an assembly line can stop it.

    cord             pulled when                                                               seen
    non_finite       the loss or the gradient norm is NaN or infinite                          before the weights move
    loss_spike       the loss lies far above its window's median, in robust deviations         before the weights move
    gradient_spike   the same for the gradient norm                                            before the weights move
    dead_gradient    the gradient norm, of all or of one layer, has been about zero for steps  before the weights move
    plateau          the newer half of the window is no better than the older half             after the step
    throughput_drop  targets per second stay far below the window's median                     after the step
    held_out_rise    the held-out loss lies well above its best                                after an evaluation

Every cord leaves an event. The policies say what else is done: skip the update, lower the learning rate, go back to
the last good checkpoint without the batches since (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1), or stop.
`non_finite` always skips the update, and stops or rewinds when it has done so too often. The windows never hold the
sample they judge, and they are saved in the checkpoint, so a resumed run judges exactly as one that was never
stopped.
"""

import math
import statistics
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from entrenar.runs import Event
from entrenar.stats import robust_z

Cord = Literal["loss_spike", "gradient_spike", "dead_gradient", "plateau", "throughput_drop", "held_out_rise"]
EarlyCord = Literal["loss_spike", "gradient_spike", "dead_gradient"]
CertainCord = Literal["non_finite", "loss_spike", "gradient_spike", "dead_gradient", "held_out_rise"]
Action = Literal["warn", "skip", "rewind", "halt"]


class MonitorConfig(BaseModel):
    """When training alarms go off, and which of them stop the run."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    halt_on: tuple[Cord, ...] = ()
    """Alarms that stop the run; the others leave an event. A non-finite step always stops it, see max_skipped_steps."""
    skip_on: tuple[EarlyCord, ...] = ()
    """Alarms whose step moves no weight."""
    lower_lr_on: tuple[Cord, ...] = ()
    """Alarms after which the learning rate is multiplied by lower_lr_by, for the rest of the run."""
    lower_lr_by: float = Field(default=0.5, gt=0.0, lt=1.0)
    """Factor of lower_lr_on."""
    rewind_on: tuple[CertainCord, ...] = ()
    """Alarms after which the run goes back to its last good checkpoint, and the batches since are left out."""
    max_rewinds: int = Field(default=3, ge=1)
    """Times to rewind before such an alarm stops the run."""
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
    held_out_rise: float = Field(default=0.1, gt=0.0)
    """Fraction above its best from which the held-out loss counts as rising."""

    @model_validator(mode="after")
    def _one_policy_each(self) -> Self:
        policies = {name: getattr(self, name) for name in ("halt_on", "skip_on", "rewind_on")}
        for cord in {cord for cords in policies.values() for cord in cords}:
            named = [name for name, cords in policies.items() if cord in cords]
            if len(named) > 1:
                raise ValueError(f"{cord} is in {' and in '.join(named)}; an alarm can have one of these policies")
        return self


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
        self._dead_layers: dict[str, int] = {}
        self._is_rising = False
        self._slow_steps = 0
        self._skipped_steps = 0

    def before_update(
        self, step: int, loss: float, grad_norm: float, layer_norms: Mapping[str, float] | None = None
    ) -> list[Event]:
        """Judge a step before its weights move, and remember it if it is finite."""
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._skipped_steps += 1
            return [Event(step, "non_finite", f"loss is {loss}, gradient norm is {grad_norm}; no parameter was moved")]
        self._skipped_steps = 0
        events = [*self._spikes(step, {"loss": loss, "grad_norm": grad_norm}), *self._dead(step, grad_norm)]
        events += self._dead_in_part(step, grad_norm, layer_norms or {})
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

    def after_evaluation(self, step: int, loss: float, best: float | None) -> list[Event]:
        """Judge a held-out loss against the best before it; a rise is told once, until the loss has come down again."""
        was_rising = self._is_rising
        self._is_rising = best is not None and not loss <= best * (1.0 + self.config.held_out_rise)
        if not self._is_rising or was_rising:
            return []
        return [Event(step, "held_out_rise", f"held-out loss {loss:.4f} after a best of {best:.4f}")]

    def action(self, event: Event) -> Action:
        """Return what is to be done about `event`."""
        config = self.config
        if event.kind == "non_finite":
            if self._skipped_steps <= config.max_skipped_steps:
                return "skip"
            return "rewind" if "non_finite" in config.rewind_on else "halt"
        if event.kind in config.halt_on:
            return "halt"
        if event.kind in config.rewind_on:
            return "rewind"
        return "skip" if event.kind in config.skip_on else "warn"

    def lr_factor(self, event: Event) -> float:
        """Return what `event` multiplies the learning rate of the later steps by."""
        return self.config.lower_lr_by if event.kind in self.config.lower_lr_on else 1.0

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

    def _dead_in_part(self, step: int, grad_norm: float, layer_norms: Mapping[str, float]) -> Iterator[Event]:
        """Name the layers with a dead gradient, unless all are dead."""
        config = self.config
        dead = [layer for layer, norm in layer_norms.items() if norm <= config.dead_gradient_norm < grad_norm]
        self._dead_layers = {layer: self._dead_layers.get(layer, 0) + 1 for layer in dead}
        names = [layer for layer, steps in self._dead_layers.items() if steps == config.dead_gradient_steps]
        if names:
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield Event(
                step,
                "dead_gradient",
                f"{names[0]}{others}: gradient norm at most {config.dead_gradient_norm:g} for "
                f"{config.dead_gradient_steps} steps",
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
            "dead_layers": dict(self._dead_layers),
            "is_rising": self._is_rising,
            "slow_steps": self._slow_steps,
            "skipped_steps": self._skipped_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore windows and counters."""
        for name, values in state["windows"].items():
            self._windows[name].clear()
            self._windows[name].extend(values)
        self._dead_steps = state["dead_steps"]
        self._dead_layers = dict(state.get("dead_layers", {}))
        self._is_rising = state.get("is_rising", False)
        self._slow_steps = state["slow_steps"]
        self._skipped_steps = state["skipped_steps"]
