"""Which checkpoints of a run exist: saved, taken up again, pruned, and rescued on the way out of an error.

A checkpoint counts as good once a step has been taken from it, or the run has ended well. Until then no older one is
deleted: what was saved may be what a diverging step left.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from entrenar.errors import MachineError
from entrenar.files import remove_incomplete
from entrenar.runs import Event, checkpoint_name, list_checkpoints
from entrenar.train import checkpoint
from entrenar.train.joint import JointWriter
from entrenar.train.metrics import Journal
from entrenar.train.optim import Optimizer
from entrenar.train.saver import Saver
from entrenar.train.settings import CheckpointConfig
from entrenar.train.task import Run, Task
from entrenar.train.world import World

_log = logging.getLogger(__name__)


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return what a folder keeps when it is renamed; None if there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


class CheckpointKeeper:
    """Keeps the checkpoints of one run in `world`; `saved_step` is the step of the newest one, 0 if there is none.

    On a rank that does not write, saving only counts; where weights are in pieces every rank writes its share.
    """

    def __init__(self, task: Task[Any], run: Run, config: CheckpointConfig, journal: Journal, world: World) -> None:
        self._task, self._run, self._config, self._journal, self.world = task, run, config, journal, world
        self._folder = run.files.checkpoints
        joint = None if world.pieces is None else JointWriter(task, world.pieces, journal.sync)
        self._saver = Saver(self._folder, task.write_model, before_commit=journal.sync, joint=joint)
        self._unconfirmed: int | None = None
        self._place = _identity(run.folder)
        self.saved_step = 0

    @property
    def save_s(self) -> float | None:
        """Seconds that the last save took; None before it."""
        return self._saver.seconds

    def clean_up(self) -> None:
        """Remove what a crash left half written."""
        if self.world.is_writer:
            remove_incomplete(self._folder)

    def restore(self, resumed: checkpoint.Checkpoint, optimizer: Optimizer) -> None:
        """Take over the weights and moments of a checkpoint; newer ones are set aside, damaged ones are reported."""
        for reason in resumed.skipped:
            self._journal.tell(Event(resumed.step, "checkpoint_damaged", reason))
        for path in checkpoint.abandon_after(self._folder, resumed.step) if self.world.is_writer else ():
            message = f"{path.name} is newer than the step resumed from"
            self._journal.tell(Event(resumed.step, "checkpoint_abandoned", message))
        trained = {name: p.detach() for name, p in self._parameters() if p.requires_grad}
        checkpoint.restore_weights(trained, self._task.read_model(resumed.model))
        optimizer.load_state_dict(resumed.optimizer())
        self.saved_step, self._unconfirmed = resumed.step, None

    def last_good(self) -> checkpoint.Checkpoint:
        """Return the newest intact checkpoint from which a step was taken; every rank returns the writer's.

        Raises: CheckpointError.
        """
        self.report(wait=True)
        folder = self._folder
        steps = [step for step in list_checkpoints(folder) if step != self._unconfirmed] if self.world.is_writer else []
        return checkpoint.latest_good(folder, among=self.world.broadcast(steps))

    def save(self, state: dict[str, Any], optimizer: Optimizer) -> None:
        """Start writing `state`, the weights and the moments.

        Raises: MachineError if the run's folder is not there any more.
        """
        if self.world.is_writer and _identity(self._run.folder) != self._place:
            raise MachineError(
                f"{self._run.folder} was moved, renamed or deleted while the run was training; continue with --resume "
                "where the folder is now"
            )
        self.report(wait=True)
        self.saved_step = state["counters"]["step"]
        if self.world.is_writer:
            self._unconfirmed = self.saved_step
        if self.world.is_writer or self.world.pieces:
            self._saver.start(self._snapshot(state, optimizer))

    def _snapshot(self, state: dict[str, Any], optimizer: Optimizer) -> checkpoint.Snapshot:
        frozen = self._task.saves_frozen
        weights = {name: p.detach() for name, p in self._parameters() if frozen or p.requires_grad}
        loss = (state["held_out"] or {}).get("loss")
        return checkpoint.Snapshot(
            state["counters"]["step"], weights, optimizer.state_dict(), state, held_out_loss=loss
        )  # fmt: skip

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the module's parameters, as pieces if they are in pieces."""
        if self.world.pieces is not None:
            self.world.pieces.reshard()
        yield from self._task.module.named_parameters()

    def confirm(self) -> None:
        """Take the newest checkpoint for good, and delete those that it makes superfluous."""
        if self._unconfirmed is not None:
            step, self._unconfirmed = self._unconfirmed, None
            self._saver.tidy(lambda: self._prune(step))

    def rescue(self, state: Mapping[str, Any] | None, optimizer: Optimizer, fault: str | None) -> None:
        """Keep the last whole step on the way out of an error, so that nothing learned is lost; delete nothing.

        With a `fault`, which says why the state is not fit to resume from, it goes to a folder of its own, also when
        it was saved already.
        """
        self._journal.dismiss_listeners()  # the error may be a listener's: a terminal that is gone, a full disk
        if state is None or not (self.world.is_writer or self.world.pieces):
            return
        try:
            self.report(wait=True)
            self._rescue(dict(state), optimizer, fault)
            self.report(wait=True)
        except MachineError as error:
            _log.error("could not save on the way out: %s", error)  # the error under way has the traceback

    def _rescue(self, state: dict[str, Any], optimizer: Optimizer, fault: str | None) -> None:
        step = state["counters"]["step"]
        apart = self._run.files.rescue
        if fault is None:
            if step > self.saved_step:
                self.save(state, optimizer)
            return
        message = f"{checkpoint_name(step)} is kept apart in {apart}, because {fault}; --resume takes the one before"
        self._journal.tell(Event(step, "checkpoint_rejected", message))
        if step == self.saved_step and self.world.is_writer:
            checkpoint.move(self._folder / checkpoint_name(step), apart)
        elif step > self.saved_step:
            self._saver.start_apart(self._snapshot(state, optimizer), apart)
            if outcome := self._saver.take(wait=True):
                _, error = outcome
                if error is not None:
                    raise error

    def report(self, *, wait: bool, is_final: bool = False) -> None:
        """Report the outcome of the checkpoint being written; with `is_final`, a failure is an error.

        Raises: MachineError.
        """
        self._report_tidying()
        outcome = self._saver.take(wait=wait)
        if outcome is None:
            return
        step, error = outcome
        if error is None:
            self._journal.tell(Event(step, "checkpoint_saved", checkpoint_name(step)), level=logging.INFO)
            return
        self.saved_step = 0
        self._journal.tell(Event(step, "checkpoint_failed", str(error)))
        if is_final:
            raise error

    def _report_tidying(self) -> None:
        while failure := self._saver.take_tidied():
            self._journal.tell(Event(self.saved_step, "prune_failed", f"{failure}; nothing is lost"))

    def wait_staged(self) -> None:
        """Return when weights and moments may change again."""
        self._saver.wait_staged()

    def close(self) -> None:
        """Wait for the checkpoint being written, and for the last one to be deleted."""
        self._saver.close()
        self._report_tidying()

    def _prune(self, step: int) -> None:
        kept = self._config
        checkpoint.prune(self._folder, newest=step, keep_last=kept.keep_last, keep_best=kept.keep_best)
