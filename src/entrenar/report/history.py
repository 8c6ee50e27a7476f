"""Read a run's folder into series that a page can draw, at most a few thousand points whatever the run's length."""

import math
import statistics
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrenar.errors import ConfigError, DataError, FormatError
from entrenar.files import read_json
from entrenar.runs import Event, RunFolder, StepRecord, list_checkpoints, read_records

MAX_POINTS = 2000
_STEPS_SMOOTHED = (5, 50)  # the running mean looks back over a twentieth of the run, within these bounds


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint."""

    step: int
    size_bytes: int
    held_out_loss: float | None
    git_revision: str | None


@dataclass(frozen=True)
class History:
    """Everything that a run's folder says about the run.

    Attributes:
        records: the steps that are drawn: all of them, or the lowest and the highest loss of each stretch.
        smooth: the running mean of the loss at each of them.
        evaluations: all records with held-out figures.
        num_steps: the last recorded step.
        phase_s: seconds by phase over the whole run.
        is_cut: the last line of the metrics is damaged, as after a crash.
        sessions: what each session ran on, and its peak of memory; none for a run of an earlier version.
    """

    name: str
    folder: Path
    records: Sequence[StepRecord]
    smooth: Sequence[float]
    evaluations: Sequence[StepRecord]
    events: Sequence[Event]
    saved: Sequence[Saved]
    config: Mapping[str, Any]
    num_steps: int
    phase_s: Mapping[str, float]
    is_cut: bool
    sessions: Sequence[Mapping[str, Any]] = ()

    @property
    def last(self) -> StepRecord:
        """The last record."""
        return self.records[-1]

    @property
    def best(self) -> StepRecord | None:
        """The evaluation with the lowest held-out loss."""
        known = [record for record in self.evaluations if record.held_out and math.isfinite(record.held_out["loss"])]
        return min(known, key=lambda record: (record.held_out or {})["loss"], default=None)


def read_history(path: Path) -> History:
    """Read the run in folder `path`.

    Raises:
        DataError: the folder holds no run, or one without a step.
        ConfigError: its config cannot be read.
        FormatError: a record is not one of this program.
    """
    run = RunFolder(path)
    if not path.is_dir():
        raise DataError(f"{path} is not a run's folder; `entrenar runs list` shows the runs there are")
    records = list(run.read_steps())
    if not records:
        raise DataError(f"{path} has no recorded step; a run writes {run.metrics.name} from its first step on")
    kept = thinned([record.loss for record in records], MAX_POINTS)
    smooth = running_mean([record.loss for record in records])
    return History(
        name=path.resolve().name,
        folder=path,
        records=[records[index] for index in kept],
        smooth=[smooth[index] for index in kept],
        evaluations=[record for record in records if record.held_out],
        events=list(run.read_events()),
        saved=list(_saved(run)),
        config=_config(run),
        num_steps=records[-1].step,
        phase_s=_phases(records),
        is_cut=_num_lines(run.metrics) > len(records),
        sessions=list(read_records(run.sessions)),
    )


def thinned(values: Sequence[float], limit: int) -> list[int]:
    """Return at most `limit` indices, in order: the first, the last, and the extremes of equal stretches between.

    So a spike of a single step is drawn, whatever the number of steps. Values that are not finite count as highest.
    """
    count = len(values)
    if count <= limit:
        return list(range(count))
    keys = [value if math.isfinite(value) else math.inf for value in values]
    stretches = (limit - 2) // 2
    kept = {0, count - 1}
    for number in range(stretches):
        stretch = range(number * count // stretches, (number + 1) * count // stretches)
        kept.add(min(stretch, key=keys.__getitem__))
        kept.add(max(stretch, key=keys.__getitem__))
    return sorted(kept)


def running_mean(values: Sequence[float]) -> list[float]:
    """Return the exponentially weighted mean up to each value, without the pull towards its start (as in Adam)."""
    low, high = _STEPS_SMOOTHED
    past = 1 - 1 / min(max(low, len(values) / 20), high)
    means, total, weight = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total = past * total + (1 - past) * value
            weight = past * weight + (1 - past)
        means.append(total / weight if weight else math.nan)
    return means


def differences(histories: Sequence[History]) -> list[tuple[str, list[str]]]:
    """Return the config keys in which the runs differ, each with its value in every run."""
    flat = [dict(_flat(history.config)) for history in histories]
    keys = sorted({key for one in flat for key in one})
    rows = [(key, [one.get(key, "") for one in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1 and key != "name"]


def _flat(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", str(value)


def _phases(records: Sequence[StepRecord]) -> dict[str, float]:
    names = {name for record in records for name in record.phases_s}
    return {name: math.fsum(record.phases_s.get(name, 0.0) for record in records) for name in sorted(names)}


def _saved(run: RunFolder) -> Iterator[Saved]:
    for step, folder in list_checkpoints(run.checkpoints).items():
        try:
            manifest = read_json(folder / "manifest.json")
            size = sum(entry["size"] for entry in manifest["files"].values())
            yield Saved(step, size, manifest.get("held_out_loss"), manifest.get("git_revision"))
        except (FormatError, OSError, KeyError, TypeError, AttributeError):
            yield Saved(step, 0, None, None)


def _config(run: RunFolder) -> dict[str, Any]:
    if not run.config.is_file():
        return {}
    try:
        return tomllib.loads(run.config.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{run.config} cannot be read: {error}") from error


def _num_lines(path: Path) -> int:
    return sum(1 for line in path.read_bytes().splitlines() if line.strip())


def median_rate(records: Sequence[StepRecord]) -> float:
    """Return the median of targets per second."""
    return statistics.median(record.targets_per_s for record in records)
