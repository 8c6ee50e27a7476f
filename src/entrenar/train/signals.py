"""Ctrl-C, SIGTERM and SIGHUP ask the run to stop after the current step; a second one stops it at once.

SIGUSR1 asks for a checkpoint after the current step, and the run goes on.

Where the signal announces a kill (a preempted machine), `grace_s` is the time until then. If the step is not over in
time, it is given up, so that the one before can still be saved.

As soon as the first signal has come, the kernel's default action is restored, so the second one ends the process even
inside a long torch call, where no Python handler would run. That is safe: checkpoints are committed by a rename.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


_AGAIN_S = 0.05


class GraceOver(BaseException):
    """The step under way is given up, because its time is over."""


class StopSignals:
    """While active, `requested` names the signal that asked the run to stop, or is None.

    `wants_checkpoint` is whether a checkpoint was asked for; whoever saves it takes the wish back. `grace_s` is the
    time from a signal to the kill; `save_s` says how long a save takes, None if that is not known yet.
    """

    def __init__(self, grace_s: float | None = None) -> None:
        self._grace_s = grace_s
        self.save_s: Callable[[], float | None] = lambda: None
        self._may_give_up = False
        self.requested: str | None = None
        self.wants_checkpoint = False
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> "StopSignals":
        # Python allows handlers in the main thread only; elsewhere the host program decides about signals.
        if threading.current_thread() is threading.main_thread():
            for number in _HANDLED:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup has it ignored: the run goes on
                    self._previous[number] = signal.signal(number, self._first)
            self._previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._save)
        return self

    def _save(self, _number: int, _frame: FrameType | None) -> None:
        self.wants_checkpoint = True

    def _first(self, number: int, _frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        for handled in self._previous.keys() - {signal.SIGUSR1, signal.SIGALRM}:
            signal.signal(handled, signal.SIG_DFL)
        if self._grace_s is not None:
            self._previous.setdefault(signal.SIGALRM, signal.signal(signal.SIGALRM, self._late))
            signal.setitimer(signal.ITIMER_REAL, max(self._grace_s - self._needed_s(self._grace_s), _AGAIN_S))

    def _needed_s(self, grace_s: float) -> float:
        """Return the time to set aside for the save: twice the last one's and a second, or half of all."""
        save_s = self.save_s()
        return grace_s / 2 if save_s is None else min(grace_s / 2, 2 * save_s + 1)

    def _late(self, _number: int, _frame: FrameType | None) -> None:
        if self._may_give_up:
            raise GraceOver
        signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)  # weights are moving, or are being saved: that comes first

    @contextmanager
    def may_give_up(self) -> Iterator[None]:
        """Let the block be given up when the time is over: nothing that it does is kept until it ends.

        Raises: GraceOver.
        """
        self._may_give_up = True
        try:
            yield
        finally:
            self._may_give_up = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if signal.SIGALRM in self._previous:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
