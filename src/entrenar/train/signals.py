"""Ctrl-C, SIGTERM and SIGHUP ask the run to stop after the current step; a second one stops it at once.

SIGUSR1 asks for a checkpoint after the current step, and the run goes on.

As soon as the first signal has come, the kernel's default action is restored, so the second one ends the process even
inside a long torch call, where no Python handler would run. That is safe: checkpoints are committed by a rename.
"""

import signal
import threading
from types import FrameType, TracebackType

_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """While active, `requested` names the signal that asked the run to stop, or is None.

    `wants_checkpoint` is whether a checkpoint was asked for; whoever saves it takes the wish back.
    """

    def __init__(self) -> None:
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
        for handled in self._previous.keys() - {signal.SIGUSR1}:
            signal.signal(handled, signal.SIG_DFL)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
