"""The training loop: everything that happens between the first batch and the last checkpoint, in the order it happens.

    gather micro-batches -> forward, backward -> judge, clip -> optimizer -> evaluate -> record -> save -> again

`fit` is that order. `_Training` holds what lives between steps: counters, optimizer, monitor, files. All of it is in
every checkpoint, so that N steps, a kill, and M more steps leave the same bytes as N + M steps.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from entrenar.errors import (
    ConfigError,
    DataError,
    EntrenarError,
    MachineError,
    NonFiniteError,
    TrainingHalted,
)
from entrenar.files import remove_incomplete
from entrenar.runs import Event, RunFolder, StepRecord, checkpoint_name, list_checkpoints
from entrenar.train import checkpoint, rng
from entrenar.train.metrics import Journal, finite
from entrenar.train.monitor import Monitor
from entrenar.train.offload import open_store
from entrenar.train.oom import explained_oom
from entrenar.train.optim import build_optimizer
from entrenar.train.phases import Phases
from entrenar.train.saver import Saver
from entrenar.train.schedule import lr_multiplier
from entrenar.train.settings import Batch, Run, Settings, Task
from entrenar.train.signals import StopSignals
from entrenar.train.step import RowLimit, sum_gradients

Reason = Literal["steps", "time", "early_stop", "signal", "data"]
_UNKNOWN_HORIZON = 1 << 30
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    reason: Reason
    step: int
    last_record: StepRecord | None
    best_held_out_loss: float | None


def _ignore(_: Any) -> None:
    """Take no notice."""


def fit(
    task: Task[Any],
    settings: Settings,
    run: Run,
    *,
    on_record: Callable[[StepRecord], None] = _ignore,
    on_event: Callable[[Event], None] = _ignore,
) -> Outcome:
    """Train `task` until a limit of `settings.train`, the data, early stopping or a signal ends the run, and save.

    Turns the module's float32 parameters into bfloat16 if the precision says so.

    Raises: NonFiniteError, TrainingHalted, OutOfMemoryError, DataError (what was learned until then is saved);
    DiskFullError when the last checkpoint cannot be written; CheckpointError for a checkpoint of another model;
    ConfigError for a folder in use.
    """
    if run.resume is None and list_checkpoints(run.checkpoints):
        raise ConfigError(f"{run.folder} already holds checkpoints; resume that run or choose another folder")
    journal = Journal(
        RunFolder(run.folder),
        after_step=run.resume.step if run.resume else 0,
        is_on_board=settings.train.tensorboard,
        on_record=on_record,
        on_event=on_event,
    )
    with closing(journal), closing(_Training(task, settings, run, journal)) as training, StopSignals() as stop:
        try:
            reason = training.begin()
            while reason is None:
                batches = training.gather()
                if not batches:
                    reason = "data"
                    break
                record = training.take_step(batches)
                reason = training.conclude_step(record, training.end(stop.requested))
            training.finish(reason)
        except EntrenarError:
            training.rescue()
            raise
    return Outcome(reason, training.counters.step, training.last_record, training.counters.best_held_out_loss)


@dataclass
class _Counters:
    """What is counted over the whole run, however often it is resumed."""

    step: int = 0
    targets: int = 0
    micro_batches: int = 0
    elapsed_s: float = 0.0
    best_held_out_loss: float | None = None
    evaluations_since_best: int = 0


class _Training:
    """The state of a run between its steps."""

    def __init__(self, task: Task[Any], settings: Settings, run: Run, journal: Journal) -> None:
        self.task, self.settings, self.run, self.journal = task, settings, run, journal
        self.total_steps = settings.train.total_steps(task.micro_batches_per_epoch)
        remedy = "choose precision = bfloat16, an adapter or a smaller model"
        with explained_oom(f"preparing the optimizer's state; {remedy}"):
            self.optimizer = build_optimizer(
                task.module.named_parameters(), settings.optim, settings.train.precision, task.lr_factors
            )
            self.saver = Saver(
                run.checkpoints, task.write_model, before_commit=journal.sync, after_commit=self._prune
            )  # fmt: skip
        self.activations = open_store(task.module, settings.train, run.folder)
        self.loss = task.loss if self.activations is None else self.activations.around(task.loss)
        self.monitor = Monitor(settings.monitor)
        self.limit = RowLimit()
        self.counters = _Counters()
        self.phases = Phases(next(task.module.parameters()).device)
        self.revision = checkpoint.git_revision()
        self.loader: dict[str, Any] | None = None
        self.held_out: Mapping[str, float] | None = None
        self.last_record: StepRecord | None = None
        self.saved_step = 0
        self.session_steps = 0
        self.clock = self.step_started = time.perf_counter()
        # The small state as of the last moment that the weights agreed with it; None while they are being moved.
        self.boundary: dict[str, Any] | None = None

    # ---- the road of `fit` ----

    def begin(self) -> Reason | None:
        """Clean up after a crash, take over the checkpoint that is resumed, and say if there is nothing left to do."""
        remove_incomplete(self.run.checkpoints)
        if self.run.resume is not None:
            self._restore(self.run.resume)
        self.task.module.train()
        self.boundary = self._capture()
        return self.end(None)

    def end(self, signal_name: str | None) -> Reason | None:
        """Say why the run ends here; None if it goes on."""
        train = self.settings.train
        if self.total_steps is not None and self.counters.step >= self.total_steps:
            return "steps"
        if signal_name is not None:
            return "signal"
        if train.max_time_s is not None and self._elapsed() >= train.max_time_s:
            return "time"
        return self._end_of_patience()

    def _end_of_patience(self) -> Reason | None:
        patience = self.settings.train.early_stop_patience
        return "early_stop" if patience is not None and self.counters.evaluations_since_best >= patience else None

    def gather(self) -> list[Batch]:
        """Take the micro-batches of one step; fewer, or none, when the data ends."""
        self.step_started = time.perf_counter()
        batches: list[Batch] = []
        with self._phase("data"):
            for batch, state in self.task.batches:
                batches.append(batch)
                self.loader = state.to_dict()
                if len(batches) == self.settings.train.grad_accum_steps:
                    break
        return batches

    def take_step(self, batches: list[Batch]) -> StepRecord:
        """Compute the gradient of `batches`, judge it, and move the weights once."""
        targets = sum(batch.num_targets for batch in batches)
        step = self.counters.step + 1
        if targets == 0:
            raise DataError(f"step {step}: none of the {len(batches)} micro-batches has a target; check the masks")
        loss_sum = sum_gradients(
            batches, self.loss, self.optimizer.gradients, self.limit, self._phase,
            on_split=lambda message: self.journal.tell(Event(step, "oom_split", message)),
        )  # fmt: skip
        with self._phase("optimizer"):
            loss, grad_norm = loss_sum.item() / targets, self.optimizer.gradient_norm().item() / targets
            lr = self.settings.optim.lr * lr_multiplier(self.settings.schedule, step, self._horizon())
        self._heed(self.monitor.before_update(step, loss, grad_norm))
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._move(lr, self._clip(grad_norm) / targets)
        else:
            self.optimizer.gradients.begin(0)
        self.counters.step, self.session_steps = step, self.session_steps + 1
        self.counters.targets += targets
        self.counters.micro_batches += len(batches)
        self.boundary = self._capture()
        return self._record(loss, lr, grad_norm, targets)

    def conclude_step(self, record: StepRecord, reason: Reason | None) -> Reason | None:
        """Evaluate, record and save what is due after a step; return why the run ends here, if it does."""
        train, save = self.settings.train, self.settings.checkpoint
        is_saving = _is_due(record.step, save.save_every)
        is_ending = reason not in (None, "signal")
        self.held_out = None
        if _is_due(record.step, train.eval_every) or is_ending or (is_saving and save.keep_best):
            self._evaluate()
        events = self.monitor.after_step(record.step, record.loss, record.targets_per_s)
        self.boundary = self._capture()
        self._write(record, is_wanted=reason is not None or _is_due(record.step, train.log_every))
        self._take_saved(wait=False)
        self._heed(events)
        if is_saving:
            self._save()
        return reason or self._end_of_patience()

    def finish(self, reason: Reason) -> None:
        """Make sure that the last step is evaluated and saved."""
        if reason == "data" and self.last_record is None:
            raise DataError(f"there is no batch to train on after step {self.counters.step}")
        if self.last_record is not None and reason == "data" and self.held_out is None:
            self._evaluate()
            self.boundary = self._capture()
            self._write(self.last_record, is_wanted=self.held_out is not None)
        if self.saved_step != self.counters.step:
            self._save()
        self._take_saved(wait=True, is_final=True)

    def rescue(self) -> None:
        """Save the last whole step on the way out of an error, so that nothing learned is lost."""
        if self.boundary is None or self.boundary["counters"]["step"] <= self.saved_step:
            return
        try:
            self._save()
            self._take_saved(wait=True)
        except MachineError as error:
            _log.error("could not save on the way out: %s", error)  # the error under way has the traceback

    def close(self) -> None:
        """Wait for the writers."""
        self.saver.close()
        if self.activations is not None:
            self.activations.close()

    # ---- the step ----

    def _heed(self, events: list[Event]) -> None:
        for event in events:
            self.journal.tell(event)
        for event in events:
            if self.monitor.halts(event):
                kind = NonFiniteError if event.kind == "non_finite" else TrainingHalted
                raise kind(f"step {event.step}: {event.kind}: {event.message}; see {self.run.checkpoints} to go on")

    def _clip(self, grad_norm: float) -> float:
        limit = self.settings.optim.grad_clip
        return limit / grad_norm if 0.0 < limit < grad_norm else 1.0

    def _move(self, lr: float, gradient_scale: float) -> None:
        with self._phase("checkpoint"):
            self.saver.wait_staged()
        self.boundary = None
        step = self.counters.step + 1
        torn = f"the optimizer was in step {step}: some weights have moved and some have not, resume from a checkpoint"
        with explained_oom(torn), self._phase("optimizer"):
            self.optimizer.step(lr, gradient_scale)

    def _horizon(self) -> int:
        """Return the number of steps the schedule spans; by the pace so far when only time limits the run."""
        time_limit_s = self.settings.train.max_time_s
        if self.total_steps is not None or time_limit_s is None or self.counters.step == 0:
            return self.total_steps or _UNKNOWN_HORIZON
        return math.ceil(self.counters.step * max(time_limit_s / self._elapsed(), 1.0)) + 1

    # ---- held-out data and records ----

    def _evaluate(self) -> None:
        if self.task.evaluate is None:
            return
        before = rng.capture()
        self.task.module.eval()
        evaluating = explained_oom("evaluating held-out data; use smaller evaluation batches")
        with evaluating, self._phase("evaluate"), torch.no_grad():
            self.held_out = dict(self.task.evaluate())
        self.task.module.train()
        rng.restore(before)
        loss, best = self.held_out["loss"], self.counters.best_held_out_loss
        if math.isfinite(loss) and (best is None or loss < best):
            self.counters.best_held_out_loss, self.counters.evaluations_since_best = loss, 0
        else:
            self.counters.evaluations_since_best += 1

    def _record(self, loss: float, lr: float, grad_norm: float, targets: int) -> StepRecord:
        per_epoch = self.task.micro_batches_per_epoch
        return StepRecord(
            step=self.counters.step,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            targets=self.counters.targets,
            targets_per_s=targets / (time.perf_counter() - self.step_started),
            elapsed_s=self._elapsed(),
            eta_s=self._eta(),
            epoch=self.counters.micro_batches / per_epoch if per_epoch else None,
            held_out=None,
            phases_s={},
        )

    def _eta(self) -> float | None:
        remaining = []
        if self.total_steps is not None:
            pace_s = (time.perf_counter() - self.clock) / max(self.session_steps, 1)
            remaining.append((self.total_steps - self.counters.step) * pace_s)
        if self.settings.train.max_time_s is not None:
            remaining.append(max(self.settings.train.max_time_s - self._elapsed(), 0.0))
        return min(remaining, default=None)

    def _write(self, record: StepRecord, *, is_wanted: bool) -> None:
        self.last_record = replace(record, held_out=self.held_out, phases_s=self.phases.take())
        if is_wanted or self.held_out is not None:
            self.journal.record(self.last_record)

    def _phase(self, name: str) -> Any:
        return self.phases(name, self.counters.step + 1)

    def _elapsed(self) -> float:
        return self.counters.elapsed_s + time.perf_counter() - self.clock

    # ---- checkpoints ----

    def _capture(self) -> dict[str, Any]:
        """Return everything small that the next step depends on, as JSON values."""
        return {
            "counters": asdict(self.counters) | {"elapsed_s": self._elapsed()},
            "loader": self.loader,
            "rng": rng.capture(),
            "monitor": self.monitor.state_dict(),
            "rows": self.limit.rows,
            "held_out": finite(self.held_out),
            "config": dict(self.run.config),
            "git_revision": self.revision,
        }

    def _restore(self, resumed: checkpoint.Checkpoint) -> None:
        for reason in resumed.skipped:
            self.journal.tell(Event(resumed.step, "checkpoint_damaged", reason))
        for path in checkpoint.abandon_after(self.run.checkpoints, resumed.step):
            message = f"{path.name} is newer than the step resumed from"
            self.journal.tell(Event(resumed.step, "checkpoint_abandoned", message))
        trained = {name: p.data for name, p in self.task.module.named_parameters() if p.requires_grad}
        checkpoint.restore_weights(trained, self.task.read_model(resumed.model))
        self.optimizer.load_state_dict(resumed.optimizer())
        self.counters = _Counters(**resumed.state["counters"])
        self.loader = resumed.loader_state
        self.monitor.load_state_dict(resumed.state["monitor"])
        self.limit.rows = resumed.state["rows"]
        self.saved_step = resumed.step
        rng.restore(resumed.state["rng"])

    def _save(self) -> None:
        """Start writing the state of the last whole step."""
        with self._phase("checkpoint"):
            self._take_saved(wait=True)
            state = self.boundary or self._capture()
            self.saved_step = state["counters"]["step"]
            weights = {name: parameter.detach() for name, parameter in self.task.module.named_parameters()}
            loss = (state["held_out"] or {}).get("loss")
            self.saver.start(
                checkpoint.Snapshot(self.saved_step, weights, self.optimizer.state_dict(), state, held_out_loss=loss)
            )

    def _take_saved(self, *, wait: bool, is_final: bool = False) -> None:
        outcome = self.saver.take(wait=wait)
        if outcome is None:
            return
        step, error = outcome
        if error is None:
            event = Event(step, "checkpoint_saved", checkpoint_name(step))
            self.journal.tell(event, level=logging.INFO)
            return
        self.saved_step = 0
        self.journal.tell(Event(step, "checkpoint_failed", str(error)))
        if is_final:
            raise error

    def _prune(self, step: int) -> None:
        kept = self.settings.checkpoint
        checkpoint.prune(self.run.checkpoints, newest=step, keep_last=kept.keep_last, keep_best=kept.keep_best)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
