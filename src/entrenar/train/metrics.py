"""Records of a run: one JSON line each, and TensorBoard's files next to them if wanted.

A crash can cut the last line; a reader drops it. A resumed run first drops the records after its checkpoint, so
that the file tells one continuous story however often the run was stopped.
"""

import importlib.util
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from entrenar.errors import ConfigError, MachineError
from entrenar.files import atomic_write, explained_disk_errors
from entrenar.runs import Event, RunFolder, StepRecord, read_records

_log = logging.getLogger(__name__)


class RecordFile:
    """An append-only JSONL file that continues after `step`."""

    def __init__(self, path: Path, *, after_step: int) -> None:
        self._path = path
        with explained_disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._open(after_step)

    def _open(self, after_step: int) -> None:
        path = self._path
        with explained_disk_errors(path):
            kept = [record for record in read_records(path) if _is_until(record.get("step", 0), after_step)]
            atomic_write(path, "".join(_to_line(record) for record in kept))
            # Unbuffered: a buffer would keep what a full disk refused, and fail once more in `close`.
            self._stream = path.open("ab", buffering=0)

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record; NaN and infinity become null. A line that fits only in part is cut off again.

        Raises: DiskFullError, MachineError.
        """
        line, written = _to_line(record).encode("utf-8"), 0
        with explained_disk_errors(self._path):
            try:
                while written < len(line):
                    written += self._stream.write(line[written:])
            except OSError:
                if written:
                    self._stream.truncate(self._stream.tell() - written)
                raise

    def rewind(self, step: int) -> None:
        """Forget the records after `step`.

        Raises: DiskFullError, MachineError.
        """
        self._stream.close()
        self._open(step)

    def sync(self) -> None:
        """Make all records durable."""
        with explained_disk_errors(self._path):
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _is_until(step: Any, last: int) -> bool:
    """Return whether a record's step is one up to `last`; what is no step at all was not written by this program."""
    return isinstance(step, int | float) and step <= last


def _to_line(record: Mapping[str, Any]) -> str:
    return json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """Return `value` with NaN and infinity replaced by None, because JSON cannot hold them."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def need_tensorboard() -> None:
    """Refuse `tensorboard = true` without its package.

    Raises: ConfigError.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("tensorboard = true needs the tensorboard package; pip install 'entrenar[tensorboard]'")


class TensorBoard:
    """Writes records as TensorBoard scalars."""

    def __init__(self, folder: Path, *, after_step: int) -> None:
        need_tensorboard()
        self._folder = folder
        self._open(after_step)

    def _open(self, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # an extra: needed only when asked for

        self._writer = SummaryWriter(str(self._folder), purge_step=after_step + 1)

    def rewind(self, step: int) -> None:
        """Let what is written next hide the figures after `step`."""
        self._writer.close()
        self._open(step)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write every number of `record` at its step."""
        for name, value in record.items():
            if name == "held_out" and value:
                for figure, number in value.items():
                    self._writer.add_scalar(f"held_out/{figure}", number, record["step"])
            elif name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(f"train/{name}", value, record["step"])

    def sync(self) -> None:
        """Write what is pending."""
        self._writer.flush()

    def close(self) -> None:
        """Write what is pending and close."""
        self._writer.close()


class Sink(Protocol):
    """Somewhere that records go."""

    def append(self, record: Mapping[str, Any], /) -> None:
        """Add one record."""

    def rewind(self, step: int, /) -> None:
        """Forget the records after `step`."""

    def sync(self) -> None:
        """Make all records durable."""

    def close(self) -> None:
        """Close it."""


class FallibleSink(Sink, Protocol):
    """A sink that can say of a run that it failed."""

    def mark_failed(self) -> None:
        """Remember that an error ended the run."""


class Journal:
    """Tells a run's story to its sinks and listeners."""

    def __init__(
        self,
        metrics: Sequence[Sink],
        events: Sequence[Sink],
        on_record: Callable[[StepRecord], None],
        on_event: Callable[[Event], None],
        both: Sequence[FallibleSink] = (),
    ) -> None:
        self._both = both
        self._metrics, self._events = (*metrics, *both), (*events, *both)
        self._sinks = (*metrics, *events, *both)
        self._on_record, self._on_event = on_record, on_event

    def record(self, record: StepRecord) -> None:
        """Write down a step."""
        for sink in self._metrics:
            sink.append(asdict(record))
        self._on_record(record)

    def tell(self, event: Event, *, level: int = logging.WARNING) -> None:
        """Write down an event, and log it."""
        _log.log(level, "step %d: %s: %s", event.step, event.kind, event.message)
        for sink in self._events:
            sink.append(asdict(event))
        self._on_event(event)

    def rewind(self, step: int) -> None:
        """Forget the figures after `step`; the events stay, for they say why."""
        for sink in self._metrics:
            sink.rewind(step)

    def dismiss_listeners(self) -> None:
        """Call no listener from now on; the sinks still get everything."""
        self._on_record = self._on_event = _ignore

    def sync(self) -> None:
        """Make everything written durable."""
        for sink in self._sinks:
            sink.sync()

    def mark_failed(self) -> None:
        """Let the sinks that can say so call the run failed when they are closed."""
        for sink in self._both:
            sink.mark_failed()

    def close(self) -> None:
        """Make the last records durable, if the disk lets us, and close the sinks."""
        with suppress(MachineError):  # each record that counts was synced before its checkpoint
            self.sync()
        for sink in self._sinks:
            sink.close()


def _ignore(_: StepRecord | Event) -> None:
    """Do nothing."""


def open_journal(
    folder: RunFolder,
    on_record: Callable[[StepRecord], None],
    on_event: Callable[[Event], None],
    trackers: Sequence[FallibleSink] = (),
    *,
    after_step: int,
    is_on_board: bool,
) -> Journal:
    """Open the metrics and events of a run, without what an earlier session recorded after `after_step`.

    `trackers` get both.

    Raises: ConfigError when TensorBoard is wanted and not installed; DiskFullError, MachineError.
    """
    board = [TensorBoard(folder.tensorboard, after_step=after_step)] if is_on_board else []
    metrics = RecordFile(folder.metrics, after_step=after_step)
    events = RecordFile(folder.events, after_step=after_step)
    return Journal((metrics, *board), (events,), on_record, on_event, trackers)
