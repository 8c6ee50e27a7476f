"""The progress of a run in a notebook: one output that is replaced while the run trains.

IPython is imported only where a kernel has loaded it already.
"""

import importlib
import sys
import time
from typing import Any

from entrenar.report.card import card, plain
from entrenar.report.follow import News
from entrenar.report.sight import Sight
from entrenar.runs import Event, StepRecord

_EVERY_S = 0.5


def is_here() -> bool:
    """Return whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


class View:
    """Shows a run below the cell that called it."""

    def __init__(self, name: str) -> None:
        self._sight, self._stage = Sight(name), ""
        self._sight.is_running = True
        self._shown = time.monotonic()
        display = importlib.import_module("IPython.display").display
        self._handle: Any = display(self, display_id=True)

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return card(self._sight, self._stage)

    def __repr__(self) -> str:
        return plain(self._sight, self._stage)

    def stage(self, text: str) -> None:
        """Show what the run is doing."""
        self._stage = text
        self._update(is_forced=True)

    def record(self, record: StepRecord) -> None:
        """Show a step, if it is time to."""
        self._sight.take(News([record], [], is_restart=False), is_running=True)
        self._update(is_forced=record.held_out is not None)

    def event(self, event: Event) -> None:
        """Show an event."""
        self._sight.take(News([], [event], is_restart=False), is_running=True)
        self._update(is_forced=True)

    def close(self) -> None:
        """Show the last state."""
        self._sight.is_running, self._stage = False, ""
        self._update(is_forced=True)

    def _update(self, *, is_forced: bool) -> None:
        now = time.monotonic()
        if is_forced or now - self._shown >= _EVERY_S:
            self._shown = now
            self._handle.update(self)
