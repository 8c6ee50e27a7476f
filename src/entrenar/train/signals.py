"""Ctrl-C, SIGTERM and SIGHUP ask the run to stop after the current step; a second one stops it at once.

As soon as the first signal has come, the kernel's default action is restored, so the second one ends the process even
inside a long torch call, where no Python handler would run. That is safe: checkpoints are committed by a rename.
"""

import signal
import threading
from types import FrameType, TracebackType

_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """While active, `requested` names the signal that asked the run to stop, or is None."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> "StopSignals":
        # Python allows handlers in the main thread only; elsewhere the host program decides about signals.
        if threading.current_thread() is threading.main_thread():
            for number in _HANDLED:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup has it ignored: the run goes on
                    self._previous[number] = signal.signal(number, self._first)
        return self

    def _first(self, number: int, _frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        for handled in self._previous:
            signal.signal(handled, signal.SIG_DFL)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
