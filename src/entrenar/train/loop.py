"""The training loop: everything that happens between the first batch and the last checkpoint, in the order it happens.

    gather micro-batches -> forward, backward -> agree -> judge, clip -> optimizer -> evaluate -> record -> save

`fit` is that order. `Progress` holds the counters and the small state of a run, `CheckpointKeeper` its checkpoints,
`StepGradient` the gradient of a step. Whatever depends on all ranks is asked of the `World`.
"""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entrenar.errors import ConfigError, DataError, MachineError, NonFiniteError, TrainingHalted
from entrenar.runs import Event, StepRecord, list_checkpoints
from entrenar.train import rng
from entrenar.train.judge import TrainedOn, fault_of_loss, fault_of_numbers
from entrenar.train.keeper import CheckpointKeeper
from entrenar.train.metrics import Journal, open_journal
from entrenar.train.norms import loss_and_norms, own_squares
from entrenar.train.offload import open_store
from entrenar.train.oom import explained_oom
from entrenar.train.optim import build_optimizer
from entrenar.train.phases import Phases, describe_step
from entrenar.train.progress import Progress, Reason, StepFigures
from entrenar.train.reactions import Reactions
from entrenar.train.replay import batch_hashes
from entrenar.train.schedule import lr_multiplier
from entrenar.train.settings import Settings
from entrenar.train.signals import GraceOver, StopSignals
from entrenar.train.step import StepGradient
from entrenar.train.task import Run, SplittableBatch, Task
from entrenar.train.trackers import open_trackers
from entrenar.train.world import World


@dataclass(frozen=True)
class Outcome:
    """The end of a run."""

    reason: Reason
    step: int
    last_record: StepRecord | None
    best_held_out_loss: float | None


def figures_of_next_step(task: Task[Any], settings: Settings, run: Run) -> tuple[StepFigures, tuple[str, ...]]:
    """Compute the gradient of the step after `run.resume` and move no weight.

    Returns: its figures, and the hash of each of its batches.

    Raises: OutOfMemoryError, CheckpointError.
    """
    journal = Journal((), (), _ignore, _ignore)
    with closing(_Training(task, settings, run, journal, World.alone(), StopSignals())) as training:
        training.begin()
        batches = training.gather()
        figures, _ = training.figures(batches)
        return figures, batch_hashes(batches)


def _ignore(_: Any) -> None:
    """Do nothing."""


def fit(
    task: Task[Any],
    settings: Settings,
    run: Run,
    world: World | None = None,
    *,
    on_record: Callable[[StepRecord], None] = _ignore,
    on_event: Callable[[Event], None] = _ignore,
) -> Outcome:
    """Train `task` until a limit of `settings.train`, the data, early stopping or a signal ends the run, and save.

    Turns the module's float32 parameters into bfloat16 if the precision says so. Without a `world` this process trains
    alone; of several ranks the writer alone calls `on_record` and `on_event`.

    Raises: NonFiniteError, TrainingHalted, OutOfMemoryError, DataError (progress until then is saved);
    DiskFullError when the last checkpoint cannot be written; CheckpointError for a checkpoint of another model;
    ConfigError for a folder in use.
    """
    world = world or World.alone()
    if run.resume is None and world.any(flag=bool(list_checkpoints(run.files.checkpoints))):
        raise ConfigError(f"{run.folder} already holds checkpoints; resume that run or choose another folder")
    after_step = run.resume.step if run.resume else 0
    is_on_board = settings.train.tensorboard
    journal = Journal((), (), _ignore, _ignore)
    if world.is_writer:
        trackers = open_trackers(settings.train.trackers, run.files, run.config)
        journal = open_journal(run.files, on_record, on_event, trackers, after_step=after_step, is_on_board=is_on_board)
    stopping = StopSignals(settings.train.grace_s)
    with closing(journal), stopping, closing(_Training(task, settings, run, journal, world, stopping)) as training:
        try:
            reason = training.run_until_end()
        except GraceOver:
            reason = training.give_up()
        except Exception as error:
            training.rescue(error)
            journal.mark_failed()
            raise
    progress = training.progress
    return Outcome(reason, progress.step, progress.last_record, progress.counters.best_held_out_loss)


class _Training:
    """The parts of a run that live from its first step to its last."""

    def __init__(
        self, task: Task[Any], settings: Settings, run: Run, journal: Journal, world: World, stop: StopSignals
    ) -> None:
        self.task, self.settings, self.run, self.journal, self.world = task, settings, run, journal, world
        self.stop = stop
        self.progress = Progress(settings, run.config, task.micro_batches_per_epoch)
        remedy = "choose precision = bfloat16, an adapter or a smaller model"
        with explained_oom(f"preparing the optimizer's state; {remedy}"):
            self.optimizer = build_optimizer(
                task.module.named_parameters(), settings.optim, settings.train.precision, task.lr_factors, world.pieces
            )
            self.keeper = CheckpointKeeper(task, run, settings.checkpoint, journal, world)
        stop.save_s = lambda: self.keeper.save_s
        self.reactions = Reactions(self.progress, self.keeper, journal, run.files)
        self.activations = open_store(task.module, settings.train, run.folder)
        self.gradient = StepGradient(
            loss=task.loss if self.activations is None else self.activations.around(task.loss),
            gradients=self.optimizer.gradients,
            limit=self.progress.limit,
            world=world,
            phase=self._phase,
            on_split=lambda message: journal.tell(Event(self.progress.step + 1, "oom_split", message)),
        )
        self.trained_on: TrainedOn | None = None
        self.unwritten: StepRecord | None = None  # of a step that is taken, until it is in the journal
        self.wants_checkpoint = False
        self.phases = Phases(next(task.module.parameters()).device)
        self.step_started = time.perf_counter()

    # ---- the order of `fit` ----

    def run_until_end(self) -> Reason:
        """Take step after step; return why the run ended."""
        reason = self.begin()
        with self.phases.run(self.world.rank):
            while reason is None:
                reason = self._step()
            self.finish(reason)
        return reason

    def _step(self) -> Reason | None:
        """Take a step inside its span; return why the run ends here, if it does."""
        with self.phases.step(self.progress.step + 1, self.progress.epoch) as span:
            before = self.progress.counters.targets
            record, reason = self.take_step(self.gather())
            if record is None:
                return reason
            describe_step(span, record, record.targets - before)
            return self.conclude_step(record, reason)

    def begin(self) -> Reason | None:
        """Clean up after a crash and take over the checkpoint to resume from; return why there is nothing left to do.

        Returns: None if there is.
        """
        self.progress.code = dict(self.run.inspect_code())
        self.keeper.clean_up()
        if self.run.resume is not None:
            self.keeper.restore(self.run.resume, self.optimizer)
            self.progress.restore(self.run.resume)
        self.task.module.train()
        self.progress.mark_boundary()
        if self.run.resume is None:
            return None  # a new run takes at least one step
        return self.progress.end(self.world.broadcast(self.progress.elapsed_s()), is_interrupted=False)

    def gather(self) -> list[SplittableBatch]:
        """Take the micro-batches of one step; fewer, or none, when the data ends."""
        self.step_started = time.perf_counter()
        batches: list[SplittableBatch] = []
        with self._phase("data"):
            for batch, position in self.task.batches:
                batches.append(batch)
                self.progress.position = position.to_dict()
                if len(batches) == self.settings.train.grad_accum_steps:
                    break
        return batches

    def take_step(self, batches: list[SplittableBatch]) -> tuple[StepRecord | None, Reason | None]:
        """Compute the gradient of `batches`, judge it, and move the weights once.

        Returns: the step's record, None when no rank has data left or the step was taken back, and why the run ends
        here, if it does.
        """
        step = self.progress.step + 1
        figures, is_interrupted = self.figures(batches)
        if figures.micro_batches == 0:
            return None, "data"
        if figures.targets == 0:
            raise DataError(
                f"step {step}: none of the {figures.micro_batches} micro-batches has a target; check the masks"
            )
        action = self.reactions.judge(batches, figures)
        if action == "rewind":
            self._rewind(figures.micro_batches)
            return None, self.progress.end(figures.elapsed_s, is_interrupted=is_interrupted)
        if action != "skip":
            self.keeper.confirm()
            self._move(figures.lr, self._clip(figures.grad_norm) / figures.targets)
            self.trained_on = TrainedOn(batches, figures.loss)
        else:
            self.optimizer.gradients.begin(0)
        self.reactions.judged = self.progress.held_out = None
        self.progress.advance(figures)
        self.progress.mark_boundary()
        self.unwritten = record = self.progress.record(figures, time.perf_counter() - self.step_started)
        return record, self.progress.end(figures.elapsed_s, is_interrupted=is_interrupted)

    def conclude_step(self, record: StepRecord, reason: Reason | None) -> Reason | None:
        """Evaluate, record and save what is due after a step; return why the run ends here, if it does."""
        train, save = self.settings.train, self.settings.checkpoint
        is_saving = _is_due(record.step, save.save_every) or self.wants_checkpoint
        is_ending = reason not in (None, "signal")
        events: list[Event] = []
        if _is_due(record.step, train.eval_every) or is_ending or (is_saving and save.keep_best):
            events += self._evaluate()
        events += self.progress.monitor.after_step(record.step, record.loss, self.progress.targets_per_s)
        self.progress.mark_boundary()
        self._write(record, is_wanted=reason is not None or _is_due(record.step, train.log_every))
        self.keeper.report(wait=False)
        if self.reactions.heed(events) == "rewind":
            self._rewind(0)
            return reason if reason == "signal" else None
        if events:
            self.progress.mark_boundary()  # once more: an alarm may have lowered the rate
        if is_saving:
            self._save()
        return reason or self.progress.end_of_patience()

    def finish(self, reason: Reason) -> None:
        """Make sure that the last step is evaluated and saved."""
        progress = self.progress
        if reason == "data" and progress.last_record is None:
            raise DataError(f"there is no batch to train on after step {progress.step}")
        if progress.last_record is not None and reason == "data" and progress.held_out is None:
            for alarm in self._evaluate():  # told only: the run is at its end
                self.journal.tell(alarm)
            progress.mark_boundary()
            self._write(progress.last_record, is_wanted=progress.held_out is not None)
        self.keeper.report(wait=True)
        if self.keeper.saved_step != progress.step:
            self._save()
        self.keeper.report(wait=True, is_final=True)
        held_out_loss = (progress.held_out or {}).get("loss", 0.0)
        if math.isfinite(held_out_loss):
            self.keeper.confirm()

    def give_up(self) -> Reason:
        """Save the last whole step, because a kill is near and the step under way will not be over in time."""
        message = "the step under way was given up, because train.grace_s is over; the one before is saved"
        self.journal.tell(Event(self.progress.step + 1, "step_given_up", message))
        self._write_if_left()
        self.keeper.rescue(self.progress.boundary, self.optimizer, None)
        return "signal"

    def rescue(self, error: Exception) -> None:
        """Keep the last whole step on the way out of an error; judge it first if the run has diverged."""
        fault = None
        self._write_if_left()
        if self.world.pieces is not None and not isinstance(error, TrainingHalted):
            return  # the others may be gone, and their pieces with them
        if self.progress.boundary is not None and isinstance(error, TrainingHalted):
            fault = self.world.fault(fault_of_numbers(self._tensors()))
            if fault is None and self.trained_on is not None:
                fault = fault_of_loss(self.task.module, self.gradient.loss, self.trained_on, self.progress.limit.rows)
                fault = fault if self.world.pieces is None else self.world.broadcast(fault)
        self.keeper.rescue(self.progress.boundary, self.optimizer, fault)
        if isinstance(error, TrainingHalted) and self.world.is_writer:
            self.reactions.write_bundle(str(error))

    def close(self) -> None:
        """Wait for the writers."""
        self.keeper.close()
        if self.activations is not None:
            self.activations.close()

    # ---- the parts of a step ----

    def figures(self, batches: list[SplittableBatch]) -> tuple[StepFigures, bool]:
        """Take the gradient; return what all ranks agree on, and whether a signal asked any of them to stop."""
        with self.stop.may_give_up():
            summed_loss, totals = self.gradient.take(batches, self._report)
        targets = max(int(totals["targets"]), 1)
        with self._phase("optimizer"):
            horizon = self.progress.horizon(totals["elapsed_s"])
            loss, grad_norm, layer_norms = loss_and_norms(self.optimizer, summed_loss, totals)
            own_gradient_s = time.perf_counter() - self.step_started
            figures = StepFigures(
                loss=loss / targets,
                lr=self.progress.counters.lr_factor
                * self.settings.optim.lr
                * lr_multiplier(self.settings.schedule, self.progress.step + 1, horizon),
                grad_norm=grad_norm / targets,
                targets=int(totals["targets"]),
                micro_batches=math.ceil(totals["micro_batches"] / self.world.size),  # a rank's is a share of one
                elapsed_s=totals["elapsed_s"],
                gradient_s=own_gradient_s if self.world.size == 1 else totals["gradient_s"],
                layer_norms={name: each / targets for name, each in layer_norms.items()},
            )
        self.wants_checkpoint = totals["wishes"] > 0
        self.stop.wants_checkpoint = False
        return figures, totals["signals"] > 0

    def _report(self) -> dict[str, float]:
        """Return what this rank adds to the agreement: time is the writer's, and one signal is enough."""
        clock = 1.0 if self.world.is_writer else 0.0
        return {
            "elapsed_s": clock * self.progress.elapsed_s(),
            "gradient_s": clock * (time.perf_counter() - self.step_started),
            "signals": float(self.stop.requested is not None),
            "wishes": float(self.stop.wants_checkpoint),
            **own_squares(self.optimizer, self.world.pieces),
        }

    def _rewind(self, micro_batches: int) -> None:
        self.optimizer.gradients.begin(0)
        self.reactions.rewind(self.optimizer, micro_batches)
        self.trained_on = None

    def _clip(self, grad_norm: float) -> float:
        limit = self.settings.optim.grad_clip
        return limit / grad_norm if 0.0 < limit < grad_norm else 1.0

    def _move(self, lr: float, gradient_scale: float) -> None:
        with self._phase("checkpoint"):
            self.keeper.wait_staged()
        self.progress.boundary = None
        step = self.progress.step + 1
        torn = f"the optimizer was in step {step}: some weights have moved and some have not, resume from a checkpoint"
        with explained_oom(torn), self._phase("optimizer"):
            self.optimizer.step(lr, gradient_scale)

    def _evaluate(self) -> list[Event]:
        """Take the held-out figures, and return the alarm that they raise."""
        if self.task.evaluate is None:
            return []
        before = rng.capture()
        self.task.module.eval()
        evaluating = explained_oom("evaluating held-out data; use smaller evaluation batches")
        with evaluating, self._phase("evaluate"), torch.no_grad(), self.stop.may_give_up():
            figures = self.world.broadcast(dict(self.task.evaluate()))
        self.task.module.train()
        rng.restore(before)
        best = self.progress.counters.best_held_out_loss
        self.progress.note_evaluation(figures)
        return self.progress.monitor.after_evaluation(self.progress.step, figures["loss"], best)

    def _write_if_left(self) -> None:
        """Write the record of a step that is about to be saved though it was interrupted before its record."""
        if self.unwritten is not None and self.progress.boundary is not None:
            self.journal.dismiss_listeners()
            with suppress(MachineError):  # the error under way says more
                self._write(self.unwritten, is_wanted=_is_due(self.unwritten.step, self.settings.train.log_every))

    def _write(self, record: StepRecord, *, is_wanted: bool) -> None:
        self.unwritten = None
        complete = self.progress.complete(record, self.phases.take())
        if is_wanted or complete.held_out is not None:
            self.journal.record(complete)

    def _save(self) -> None:
        """Start a checkpoint.

        Raises: NonFiniteError for a state that holds NaN or infinity: it would take the place of a good one.
        """
        if fault := self.world.fault(fault_of_numbers(self._tensors())):
            step = self.progress.step
            raise NonFiniteError(
                f"step {step}: not saved, because {fault}: the step itself made them so; lower the learning rate, and "
                f"resume from {self.run.files.checkpoints}"
            )
        with self._phase("checkpoint"):
            self.progress.code = dict(self.run.inspect_code())
            state = self.progress.boundary or self.progress.mark_boundary()
            self.keeper.save({**state, "code": self.progress.code}, self.optimizer)

    def _tensors(self) -> dict[str, Tensor]:
        trained = {name: one for name, one in self.task.module.named_parameters() if one.requires_grad}
        return {**trained, **self.optimizer.state_dict()}

    def _phase(self, name: str) -> AbstractContextManager[None]:
        return self.phases(name, self.progress.step + 1)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
