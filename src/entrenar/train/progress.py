"""Track a run's progress: every small piece of state that its next step depends on.

Every checkpoint holds it, so that N steps, a kill, and M more steps leave the same bytes as N + M steps. The
*boundary* is this state as of the last moment at which it agreed with the weights; a checkpoint holds the boundary,
never something half-way through a step.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from entrenar.runs import StepRecord
from entrenar.train import rng
from entrenar.train.checkpoint import Checkpoint, git_revision
from entrenar.train.metrics import finite
from entrenar.train.monitor import Monitor
from entrenar.train.settings import Settings
from entrenar.train.step import RowLimit

Reason = Literal["steps", "time", "early_stop", "signal", "data"]

_UNKNOWN_HORIZON = 1 << 30


@dataclass
class Counters:
    """Counts over the whole run, however often it is resumed."""

    step: int = 0
    targets: int = 0
    micro_batches: int = 0
    elapsed_s: float = 0.0
    best_held_out_loss: float | None = None
    evaluations_since_best: int = 0
    lr_factor: float = 1.0
    rewinds: int = 0


@dataclass(frozen=True)
class StepFigures:
    """The figures of one step, agreed by all ranks; `layer_norms` are the gradient norms of its layers.

    `elapsed_s` is the writer's clock when its gradient was there, `gradient_s` how long the writer took for it.
    """

    loss: float
    lr: float
    grad_norm: float
    targets: int
    micro_batches: int
    elapsed_s: float
    gradient_s: float
    layer_norms: Mapping[str, float]


class Progress:
    """The state of a run between its steps.

    Attributes:
        position: where the data loader is after the last batch taken, as JSON values.
        held_out: figures of the evaluation after the last step, None if there was none.
        targets_per_s: the pace of the last step without the optimizer, the same on every rank.
        boundary: the state that agrees with the weights; None while they are being moved.
        code: what is known of the code that trains, as JSON values.
    """

    def __init__(self, settings: Settings, config: Mapping[str, Any], micro_batches_per_epoch: int | None) -> None:
        self._train = settings.train
        self._config = dict(config)
        self._per_epoch = micro_batches_per_epoch
        self._revision = git_revision()
        self._session_steps = 0
        self._clock = time.perf_counter()
        self.total_steps = settings.train.total_steps(micro_batches_per_epoch)
        self.counters = Counters()
        self.monitor = Monitor(settings.monitor)
        self.limit = RowLimit()
        self.position: dict[str, Any] | None = None
        self.held_out: Mapping[str, float] | None = None
        self.targets_per_s = 0.0
        self.last_record: StepRecord | None = None
        self.boundary: dict[str, Any] | None = None
        self.code: dict[str, Any] = {}

    @property
    def step(self) -> int:
        """Steps taken in all."""
        return self.counters.step

    def elapsed_s(self) -> float:
        """Return the seconds that the run has taken, over all its sessions."""
        return self.counters.elapsed_s + time.perf_counter() - self._clock

    def advance(self, figures: StepFigures) -> None:
        """Count a step."""
        self._session_steps += 1
        self.counters.step += 1
        self.counters.targets += figures.targets
        self.counters.micro_batches += figures.micro_batches
        self.targets_per_s = figures.targets / figures.gradient_s

    # ---- limits ----

    def horizon(self, elapsed_s: float) -> int:
        """Return the number of steps that the schedule spans: an estimate if only time limits the run."""
        time_limit_s = self._train.max_time_s
        if self.total_steps is not None or time_limit_s is None or self.step == 0:
            return self.total_steps or _UNKNOWN_HORIZON
        return math.ceil(self.step * max(time_limit_s / elapsed_s, 1.0)) + 1

    def end(self, elapsed_s: float, *, is_interrupted: bool) -> Reason | None:
        """Return why the run ends here; None if it continues."""
        if self.total_steps is not None and self.step >= self.total_steps:
            return "steps"
        if is_interrupted:
            return "signal"
        if self._train.max_time_s is not None and elapsed_s >= self._train.max_time_s:
            return "time"
        return self.end_of_patience()

    def end_of_patience(self) -> Reason | None:
        """Return "early_stop" if the held-out loss has not improved for too long."""
        patience = self._train.early_stop_patience
        return "early_stop" if patience is not None and self.counters.evaluations_since_best >= patience else None

    # ---- figures ----

    def note_evaluation(self, figures: Mapping[str, float]) -> None:
        """Take in held-out figures; a loss that is not finite is never the best."""
        self.held_out = figures
        loss, best = figures["loss"], self.counters.best_held_out_loss
        if math.isfinite(loss) and (best is None or loss < best):
            self.counters.best_held_out_loss, self.counters.evaluations_since_best = loss, 0
        else:
            self.counters.evaluations_since_best += 1

    @property
    def epoch(self) -> float | None:
        """Passes over the data so far; None if its length is not known."""
        return self.counters.micro_batches / self._per_epoch if self._per_epoch else None

    def record(self, figures: StepFigures, step_s: float) -> StepRecord:
        """Return the record of the step just counted; it took `step_s`."""
        return StepRecord(
            step=self.step,
            loss=figures.loss,
            lr=figures.lr,
            grad_norm=figures.grad_norm,
            targets=self.counters.targets,
            targets_per_s=figures.targets / step_s,
            elapsed_s=self.elapsed_s(),
            eta_s=self._eta_s(),
            epoch=self.epoch,
            held_out=None,
            phases_s={},
        )

    def complete(self, record: StepRecord, phases_s: Mapping[str, float]) -> StepRecord:
        """Add the evaluation after the step and its phases to its record, and return it."""
        self.last_record = replace(record, held_out=self.held_out, phases_s=phases_s)
        return self.last_record

    def _eta_s(self) -> float | None:
        remaining = []
        if self.total_steps is not None:
            pace_s = (time.perf_counter() - self._clock) / max(self._session_steps, 1)
            remaining.append((self.total_steps - self.step) * pace_s)
        if self._train.max_time_s is not None:
            remaining.append(max(self._train.max_time_s - self.elapsed_s(), 0.0))
        return min(remaining, default=None)

    # ---- the boundary ----

    def mark_boundary(self) -> dict[str, Any]:
        """Remember the current state as one that agrees with the weights, and return it."""
        self.boundary = {
            "counters": asdict(self.counters) | {"elapsed_s": self.elapsed_s()},
            "loader": self.position,
            "rng": rng.capture(),
            "monitor": self.monitor.state_dict(),
            "rows": self.limit.rows,
            "held_out": finite(self.held_out),
            "config": self._config,
            "git_revision": self._revision,
            "code": self.code,
        }
        return self.boundary

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over the state of a checkpoint."""
        self.counters = Counters(**checkpoint.state["counters"])
        self.position = checkpoint.loader_state
        self.monitor.load_state_dict(checkpoint.state["monitor"])
        self.limit.rows = checkpoint.state["rows"]
        rng.restore(checkpoint.state["rng"])

    def rewind(self, checkpoint: Checkpoint, micro_batches: int) -> None:
        """Take over the state of a checkpoint, but leave out the data between: the batches, which may be the cause.

        Time, passes over the data and what is known of memory go on; `micro_batches` were taken and not yet counted.
        """
        before, position, rows = self.counters, self.position, self.limit.rows
        self.restore(checkpoint)
        self.position, self.limit.rows = position, rows
        self.counters.elapsed_s = before.elapsed_s
        self.counters.micro_batches = before.micro_batches + micro_batches
        self.counters.lr_factor = before.lr_factor
        self.counters.rewinds = before.rewinds + 1
        self.held_out = None
        self.mark_boundary()
