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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from entrenar.errors import FormatError

MODEL_FOLDER = "model"

# Marks the field of a config that a resumed run may change: Field(json_schema_extra=CHANGEABLE). It says how long a
# run lasts, where it is and what it reports, and never what a step computes.
CHANGEABLE: dict[str, Any] = {"may_change_on_resume": True}

# Marks a field that no resumed run may change, also when changes are allowed: a checkpoint's tensors, or its place in
# the data, are nothing without it.
FIXED: dict[str, Any] = {"fixed_by_checkpoint": True}

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


# Events of a healthy run, which nobody needs to be told one by one.
ROUTINE_EVENTS = ("checkpoint_saved",)

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
    def sessions(self) -> Path:
        """What each session ran on, and its peak of memory."""
        return self.path / "sessions.jsonl"

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
    """Return the record that a line of `path` holds; a loss, norm or held-out figure that was not finite is NaN.

    Raises: FormatError for one without one of StepRecord's fields, or with a field of another kind.
    """
    known = {**content, **{key: math.nan for key in ("loss", "grad_norm") if content.get(key, 0) is None}}
    if isinstance(held_out := content.get("held_out"), dict):
        known["held_out"] = {key: math.nan if value is None else value for key, value in held_out.items()}
    return _record(StepRecord, known, path)


def to_event(content: Mapping[str, Any], path: Path) -> Event:
    """Return the event that a line of `path` holds.

    Raises: FormatError for one without one of Event's fields, or with a field of another kind.
    """
    return _record(Event, content, path)


_LARGEST = 1 << 63  # JSON's whole numbers have no end, floats have one


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < _LARGEST)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_finite_or_none(value: Any) -> bool:
    return value is None or _is_finite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < _LARGEST


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_held_out(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and "loss" in value and all(map(_is_number, value.values())))


def _is_phases(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_finite, value.values()))


_FIELDS: Mapping[type, Mapping[str, Callable[[Any], bool]]] = {
    StepRecord: {
        "step": _is_whole, "loss": _is_number, "lr": _is_finite, "grad_norm": _is_number, "targets": _is_whole,
        "targets_per_s": _is_finite, "elapsed_s": _is_finite, "eta_s": _is_finite_or_none, "epoch": _is_finite_or_none,
        "held_out": _is_held_out, "phases_s": _is_phases,
    },
    Event: {"step": _is_whole, "kind": _is_text, "message": _is_text},
}  # fmt: skip


def _record(kind: type[RecordT], content: Mapping[str, Any], path: Path) -> RecordT:
    """Build a record; fields that this version does not know are left out."""
    rules = _FIELDS[kind]
    for name, holds in rules.items():
        if name not in content:
            raise FormatError(f"{path}: a {kind.__name__} needs the field {name}, got {dict(content)!r:.200}")
        if not holds(content[name]):
            raise FormatError(f"{path}: {name} of a {kind.__name__} cannot be {content[name]!r:.100}")
    return kind(**{name: content[name] for name in rules})


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file up to the first damaged line; none if there is no file."""
    if not path.is_file():
        return
    with path.open("rb") as stream:
        for line in stream:
            if not line.endswith(b"\n"):
                return
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
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
