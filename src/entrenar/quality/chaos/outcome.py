"""How a program ended under its conditions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from entrenar.errors import GateFailed, NotMeasured

Ending = Literal["survived", "refused", "killed", "timed_out", "crashed"]


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        ending: survived: exit code 0. refused: another exit code, or a typed error, and no traceback. killed: by the
            signal or limit that was asked for. timed_out. crashed: a traceback, or a signal that nobody asked for.
        exit_code: of the process; minus the number of the signal that ended it.
        error: the name of the error that a function ended with.
        message: what the error says, or the last lines of a command.
        peak_bytes: most memory that the process held.
        sent: what was done to it, with seconds since its start.
        not_enforced: conditions that this machine could not set, with the reason.
    """

    ending: Ending
    exit_code: int
    error: str | None
    message: str
    seconds: float
    peak_bytes: int
    sent: Sequence[tuple[float, str]]
    not_enforced: Sequence[str]

    @property
    def is_graceful(self) -> bool:
        """Return whether the program did what it should: succeed, or say clearly why it cannot."""
        return self.ending in ("survived", "refused")

    def demand(self) -> None:
        """Accept nothing but a graceful ending under conditions that were all there.

        Raises:
            GateFailed: it crashed, was killed or ran out of time.
            NotMeasured: a condition could not be set.
        """
        if not self.is_graceful:
            raise GateFailed(f"{self.ending} with exit code {self.exit_code}: {self.message}")
        if self.not_enforced:
            raise NotMeasured("; ".join(self.not_enforced))
