"""The layout of a run's folder and the records in it.

    runs/NAME/
      config.toml       every setting of the run
      metrics.jsonl     one StepRecord a line
      events.jsonl      one Event a line: training alarms, splits after running out of memory, checkpoints
      tensorboard/      the same figures for TensorBoard, if wanted
      trackers.json     the run's identity in each experiment tracker that it uses
      spans.sqlite      a trace of the run, if one was recorded
      report.html       the page that `entrenar report` writes
      checkpoints/
        step-00000100/  one committed checkpoint; its model or adapter is in model/
      rescue/           the state of a run that had diverged, kept apart; no resume takes it
      replay/           one JSON file for each step whose alarm stopped the run: `entrenar replay` takes it again
      .lock             held by the process that trains

`train` writes these files; the report, the tracer and the command line read them. None of the readers needs torch.
A crash can cut the last line of a JSONL file, so a reader stops at the first damaged line.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from entrenar.errors import FormatError

MODEL_FOLDER = "model"

# Marks the field of a config that a resumed run may change: Field(json_schema_extra=CHANGEABLE). It says how long a
# run lasts, where it is and what it reports, and never what a step computes.
CHANGEABLE: dict[str, Any] = {"may_change_on_resume": True}

_CHECKPOINT_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class StepRecord:
    """One step of training; `loss` is the mean per target.

    Attributes:
        targets: targets trained on since the run began.
        elapsed_s: seconds since the run began, over all resumes; `eta_s` is the estimate until its end.
        epoch: passes over the corpus so far; None if its length is not known.
        held_out: the figures of an evaluation after this step, "loss" among them.
        phases_s: seconds by phase since the record before.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    targets: int
    targets_per_s: float
    elapsed_s: float
    eta_s: float | None
    epoch: float | None
    held_out: Mapping[str, float] | None
    phases_s: Mapping[str, float]


@dataclass(frozen=True)
class Event:
    """Something a person should know about a step."""

    step: int
    kind: str
    message: str


RecordT = TypeVar("RecordT", StepRecord, Event)


@dataclass(frozen=True)
class RunFolder:
    """Where each part of a run is."""

    path: Path

    @property
    def config(self) -> Path:
        """The settings in TOML."""
        return self.path / "config.toml"

    @property
    def metrics(self) -> Path:
        """The StepRecords."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """The Events."""
        return self.path / "events.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard's files."""
        return self.path / "tensorboard"

    @property
    def trackers(self) -> Path:
        """The run's identities in experiment trackers."""
        return self.path / "trackers.json"

    @property
    def spans(self) -> Path:
        """The trace of the run."""
        return self.path / "spans.sqlite"

    @property
    def report(self) -> Path:
        """The HTML report."""
        return self.path / "report.html"

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def rescue(self) -> Path:
        """The folder of states that are not fit to resume from."""
        return self.path / "rescue"

    @property
    def replay(self) -> Path:
        """The folder of the bundles of steps whose alarm stopped the run."""
        return self.path / "replay"

    @property
    def lock(self) -> Path:
        """The file that the training process holds a lock on."""
        return self.path / ".lock"

    def read_steps(self) -> Iterator[StepRecord]:
        """Yield the recorded steps in order; a loss or norm that was not finite is NaN.

        Raises: FormatError for a record without one of StepRecord's fields.
        """
        path = self.metrics
        for content in read_records(path):
            yield to_step(content, path)

    def read_events(self) -> Iterator[Event]:
        """Yield the events in order.

        Raises: FormatError for a record without one of Event's fields.
        """
        path = self.events
        for content in read_records(path):
            yield to_event(content, path)


def to_step(content: Mapping[str, Any], path: Path) -> StepRecord:
    """Return the record that a line of `path` holds; a loss or norm that was not finite is NaN.

    Raises: FormatError for one without one of StepRecord's fields.
    """
    nulls = {key: math.nan for key in ("loss", "grad_norm") if content.get(key, 0) is None}
    return _record(StepRecord, {**content, **nulls}, path)


def to_event(content: Mapping[str, Any], path: Path) -> Event:
    """Return the event that a line of `path` holds.

    Raises: FormatError for one without one of Event's fields.
    """
    return _record(Event, content, path)


_NAMES: Mapping[type, Sequence[str]] = {kind: [field.name for field in fields(kind)] for kind in (StepRecord, Event)}


def _record(kind: type[RecordT], content: Mapping[str, Any], path: Path) -> RecordT:
    """Build a record; fields that this version does not know are left out."""
    names = _NAMES[kind]
    missing = [name for name in names if name not in content]
    if missing:
        raise FormatError(f"{path}: a {kind.__name__} needs the field {missing[0]}, got {dict(content)!r:.200}")
    return kind(**{name: content[name] for name in names})


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file up to the first damaged line; none if there is no file."""
    if not path.exists():
        return
    with path.open("rb") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except ValueError:
                return
            if isinstance(record, dict):
                yield record


def checkpoint_name(step: int) -> str:
    """Return the folder name of the checkpoint after `step`."""
    return f"step-{step:08d}"


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """Return the committed checkpoints in `folder` by step, oldest first, without checking their content."""
    if not folder.is_dir():
        return {}
    found = {int(match[1]): path for path in folder.iterdir() if (match := _CHECKPOINT_NAME.fullmatch(path.name))}
    return {step: found[step] for step in sorted(found)}
