"""Who is late when a sum over all ranks does not come about, and where that rank stands.

Each rank counts the sums that it has come to, in RUN/ranks/rank-N.sums. A rank that waits in vain reads the counts of
the others: those behind its own are late. A rank that has not come to its next sum in half of the time that the others
wait writes the stacks of its threads to RUN/ranks/rank-N.stacks, from a thread of its own (faulthandler), so also out
of a call that never returns.
"""

import faulthandler
import os
import time
from pathlib import Path

from entrenar.errors import MachineError

RANKS_FOLDER = "ranks"


class Watch:
    """Counts the sums of this rank and knows those of the others; `timeout_s` is how long a rank waits."""

    def __init__(self, run_dir: Path, rank: int, timeout_s: float) -> None:
        """Open the files of this rank.

        Raises: MachineError.
        """
        self._folder, self._rank, self._after_s = run_dir / RANKS_FOLDER, rank, timeout_s / 2
        self._count, self._expected = 0, float("-inf")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._sums = os.open(self._path(rank, "sums"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
            self._stacks = self._path(rank, "stacks").open("w", encoding="utf-8")
        except OSError as error:
            raise MachineError(
                f"cannot write in {self._folder}: {error.strerror}; see that it can be written"
            ) from error
        self.note()

    def _path(self, rank: int, what: str) -> Path:
        return self._folder / f"rank-{rank}.{what}"

    def note(self) -> None:
        """Count a sum that this rank has come to, and expect the next one in time."""
        self._count += 1
        os.pwrite(self._sums, f"{self._count}\n".encode(), 0)
        self.expect()

    def expect(self) -> None:
        """Expect the next sum in time from now on, or from at most a twentieth of that time ago.

        Each alarm is a thread: one for every sum took 3 ms a tensor, half of a step of two ranks.
        """
        now = time.monotonic()
        if now - self._expected >= self._after_s / 20:
            self._expected = now
            faulthandler.dump_traceback_later(self._after_s, file=self._stacks)

    def late(self) -> list[int]:
        """Return the ranks that have not come to the sum that this one waits for."""
        found = []
        for path in self._folder.glob("rank-*.sums"):
            rank = path.stem.removeprefix("rank-")
            if rank.isdecimal() and _count(path) < self._count:
                found.append(int(rank))
        return sorted(found)

    def close(self) -> None:
        """Expect nothing any more; a file without a stack is removed."""
        faulthandler.cancel_dump_traceback_later()
        os.close(self._sums)
        self._stacks.close()
        self._path(self._rank, "sums").unlink(missing_ok=True)
        if not self._path(self._rank, "stacks").stat().st_size:
            self._path(self._rank, "stacks").unlink()


def _count(path: Path) -> int:
    try:
        return int(path.read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return 0
