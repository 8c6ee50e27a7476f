"""Follow a run while it trains: read what its files gained since the last look.

A resumed run writes its files again, without the records after its checkpoint; the new file has another inode, and is
read from its start. A line counts once its end is there.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrenar.runs import Event, RunFolder, StepRecord, to_event, to_step


class Tail:
    """A JSONL file that grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._inode: int | None = None
        self._offset = 0

    def read(self) -> tuple[list[dict[str, Any]], bool]:
        """Return the objects of the lines that are new, and whether the file was replaced since the last look.

        A line that is not JSON is left out. No file is a file without lines.
        """
        if not self.path.is_file():
            return [], False
        try:
            with self.path.open("rb") as stream:
                inode, is_replaced = self._place(stream.fileno())
                stream.seek(self._offset)
                whole, _, _ = stream.read().rpartition(b"\n")
        except FileNotFoundError:
            return [], False
        self._inode, self._offset = inode, self._offset + len(whole) + bool(whole)
        return list(_objects(whole)), is_replaced

    def _place(self, descriptor: int) -> tuple[int, bool]:
        """Begin again if the open file is not the one read before, or became shorter."""
        status = os.fstat(descriptor)
        is_replaced = self._inode is not None and (status.st_ino != self._inode or status.st_size < self._offset)
        if is_replaced:
            self._offset = 0
        return status.st_ino, is_replaced


def _objects(lines: bytes) -> Iterator[dict[str, Any]]:
    for line in lines.splitlines():
        try:
            content = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            yield content


@dataclass(frozen=True)
class News:
    """What a run wrote since the last look; after a restart, everything that still holds."""

    steps: list[StepRecord]
    events: list[Event]
    is_restart: bool


class Follower:
    """Reads a run's records and events as they are written."""

    def __init__(self, run: RunFolder) -> None:
        self._steps, self._events = Tail(run.metrics), Tail(run.events)

    def read(self) -> News:
        """Return what is new.

        Raises: FormatError for a record of another program.
        """
        steps, is_restart = self._steps.read()
        events, _ = self._events.read()
        return News(
            [to_step(content, self._steps.path) for content in steps],
            [to_event(content, self._events.path) for content in events],
            is_restart,
        )
