"""What is done about a training alarm, beyond the event that it leaves.

    policy     what happens                                                              decided in
    warn       nothing else                                                              -
    skip       the step moves no weight                                                  `loop.take_step`
    lower_lr   the later steps take a fraction of the rate                               `Reactions.heed`
    rewind     back to the last good checkpoint; the batches since are left out          `Reactions.rewind`
    halt       the run stops with what is needed to look into it                         `Reactions.heed`

A rewind depends on nothing but the checkpoint and the data, so a run that is killed after one and resumed from the
same checkpoint goes the same way again: same alarm, same rewind, same weights.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from entrenar.errors import CheckpointError, MachineError, NonFiniteError, TrainingHalted
from entrenar.runs import Event, RunFolder, checkpoint_name
from entrenar.train.keeper import CheckpointKeeper
from entrenar.train.metrics import Journal
from entrenar.train.monitor import Action
from entrenar.train.optim import Optimizer
from entrenar.train.progress import Progress, StepFigures
from entrenar.train.replay import Bundle, batch_hashes, current_trace, figures_by_name, machine
from entrenar.train.task import SplittableBatch


@dataclass(frozen=True)
class Judged:
    """A step after its gradient and before its update: its batches and figures."""

    batches: Sequence[SplittableBatch]
    figures: StepFigures


class Reactions:
    """Carries out the policies of a run's alarms; `judged` is the step between its gradient and its update."""

    def __init__(self, progress: Progress, keeper: CheckpointKeeper, journal: Journal, files: RunFolder) -> None:
        self._progress, self._keeper, self._journal, self._files = progress, keeper, journal, files
        self._alarms: list[Event] = []
        self.judged: Judged | None = None

    def judge(self, batches: Sequence[SplittableBatch], figures: StepFigures) -> Action:
        """Judge the next step by its figures, and return what is to be done; see `heed`."""
        self.judged = Judged(batches, figures)
        step = self._progress.step + 1
        return self.heed(
            self._progress.monitor.before_update(step, figures.loss, figures.grad_norm, figures.layer_norms)
        )

    def heed(self, alarms: list[Event]) -> Action:
        """Tell the alarms, lower the rate of the later steps if they ask for it, and return what else is to be done.

        Raises: NonFiniteError, TrainingHalted for an alarm that stops the run.
        """
        self._alarms = alarms
        monitor, counters = self._progress.monitor, self._progress.counters
        actions: dict[Action, Event] = {}
        for alarm in alarms:
            self._journal.tell(alarm)
            actions.setdefault(monitor.action(alarm), alarm)
            if (factor := monitor.lr_factor(alarm)) < 1.0:
                counters.lr_factor *= factor
                message = f"because of {alarm.kind}, to {counters.lr_factor:g} of the schedule's"
                self._journal.tell(Event(alarm.step, "rate_lowered", message))
        if "halt" in actions:
            self._halt(actions["halt"])
        if "rewind" in actions and counters.rewinds >= monitor.config.max_rewinds:
            self._halt(actions["rewind"], f", and the run was rewound {counters.rewinds} times before")
        return "rewind" if "rewind" in actions else "skip" if "skip" in actions else "warn"

    def rewind(self, optimizer: Optimizer, micro_batches: int) -> None:
        """Go back to the last good checkpoint and leave out the batches since (a quarantine).

        `micro_batches` were taken in the step of the alarms that were heeded last, and are not counted yet.

        Raises: NonFiniteError, TrainingHalted if there is no checkpoint to go back to.
        """
        alarm = next(each for each in self._alarms if self._progress.monitor.action(each) == "rewind")
        try:
            good = self._keeper.last_good()
        except CheckpointError as error:
            self._halt(alarm, f", and there is nothing to go back to ({error})")
        self._keeper.wait_staged()
        self._keeper.restore(good, optimizer)
        self._journal.rewind(good.step)
        self._progress.rewind(good, micro_batches)
        message = (
            f"back to step {good.step}, because of {alarm.kind} at step {alarm.step}; the batches since are left out: "
            f"from {good.loader_state} to {self._progress.position}"
        )
        self._journal.tell(Event(good.step, "rewound", message))
        self.judged = None

    def write_bundle(self, alarm: str) -> None:
        """Write what it takes to take the step of an alarm again, unless it was taken or the disk does not let us."""
        if self.judged is None:
            return
        files, step = self._files, self._progress.step
        places = (files.rescue / checkpoint_name(step), files.checkpoints / checkpoint_name(step))
        bundle = Bundle(
            step=step + 1,
            alarm=alarm,
            checkpoint=next((str(place.relative_to(files.path)) for place in places if place.is_dir()), None),
            before=(self._progress.boundary or {}).get("loader"),
            after=self._progress.position,
            batches=batch_hashes(self.judged.batches),
            figures=figures_by_name(self.judged.figures),
            monitor=self._progress.monitor.state_dict(),
            machine=machine(self._keeper.world.size),
            trace_id=current_trace(),
        )
        path = files.replay / f"{checkpoint_name(step + 1)}.json"
        with suppress(MachineError):
            bundle.write(path)
            self._journal.tell(Event(step + 1, "bundle_written", f"`entrenar replay {path}` takes the step again"))

    def _halt(self, alarm: Event, also: str = "") -> NoReturn:
        kind = NonFiniteError if alarm.kind == "non_finite" else TrainingHalted
        place = self._files.checkpoints
        raise kind(f"step {alarm.step}: {alarm.kind}: {alarm.message}{also}; to continue, resume from {place}")
