"""A run at a moment, built up from its news, so that a look at a long run costs no more than at a short one."""

import math
from collections import deque
from collections.abc import Mapping

from entrenar.report.follow import News
from entrenar.runs import ROUTINE_EVENTS, Event, StepRecord

_KEPT_EVENTS, _MEAN_OVER = 5, 20


class Sight:
    """A run as far as it has been followed.

    Attributes:
        losses: every finite loss, in order; `held_out_losses` are finite too, each with its index among them.
        held_out: the figures of the newest evaluation; `best` is the record of the lowest held-out loss.
        phases_s: seconds by phase over all records.
        events: the newest events, without those of saved checkpoints, which `num_saved` counts.
        new_events, new_evaluations: those of the last news; of older ones only as many as `events` holds.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_running = False
        self._forget()

    def _forget(self) -> None:
        self.last: StepRecord | None = None
        self.losses: list[float] = []
        self.held_out_losses: list[tuple[int, float]] = []
        self.held_out: Mapping[str, float] | None = None
        self.best: StepRecord | None = None
        self.phases_s: dict[str, float] = {}
        self.events: deque[Event] = deque(maxlen=_KEPT_EVENTS)
        self.num_saved = 0
        self.new_events: list[Event] = []
        self.new_evaluations: list[StepRecord] = []
        self.has_new_step = False

    def take(self, news: News, *, is_running: bool) -> None:
        """Add what is new; a run that was resumed is told from its beginning."""
        self.is_running = is_running
        is_first = self.last is None or news.is_restart
        if news.is_restart:
            self._forget()
        for record in news.steps:
            self._count(record)
        loud = [event for event in news.events if event.kind not in ROUTINE_EVENTS]
        self.num_saved += sum(event.kind == "checkpoint_saved" for event in news.events)
        self.events.extend(loud)
        evaluations = [record for record in news.steps if record.held_out]
        self.new_events = loud[-_KEPT_EVENTS:] if is_first else loud
        self.new_evaluations = evaluations[-_KEPT_EVENTS:] if is_first else evaluations
        self.has_new_step = bool(news.steps)

    def _count(self, record: StepRecord) -> None:
        self.last = record
        if math.isfinite(record.loss):
            self.losses.append(record.loss)
        for name, seconds in record.phases_s.items():
            self.phases_s[name] = self.phases_s.get(name, 0.0) + seconds
        if record.held_out:
            self.held_out = record.held_out
            loss = _held_out_loss(record)
            if loss < _held_out_loss(self.best):
                self.best = record
            if math.isfinite(loss):
                self.held_out_losses.append((max(len(self.losses) - 1, 0), loss))

    @property
    def mean_loss(self) -> float:
        """The mean of the newest losses; NaN without one."""
        newest = self.losses[-_MEAN_OVER:]
        return math.fsum(newest) / len(newest) if newest else math.nan

    @property
    def share_done(self) -> float | None:
        """How much of the run's time is over, by its own estimate; None without one."""
        if self.last is None or self.last.eta_s is None:
            return None
        total = self.last.elapsed_s + self.last.eta_s
        return self.last.elapsed_s / total if total > 0 else None


def _held_out_loss(record: StepRecord | None) -> float:
    loss = None if record is None or record.held_out is None else record.held_out.get("loss")
    return loss if loss is not None and math.isfinite(loss) else math.inf
