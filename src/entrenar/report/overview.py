"""The runs of a folder at a glance: when each began, how it ended, how good it became.

A folder of runs holds whatever people left there, so nothing here raises for one of them: what cannot be read is
listed with the reason.
"""

import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from entrenar.errors import ConfigError, DataError, EntrenarError, MachineError
from entrenar.files import explained_disk_errors
from entrenar.locks import check_free, is_held
from entrenar.report.history import History, read_history
from entrenar.runs import RunFolder, list_checkpoints

_ALARMS = ("non_finite", "checkpoint_rejected", "bundle_written")


@dataclass(frozen=True)
class Overview:
    """One run in a line.

    Attributes:
        kind: "pre-training", "full", "lora" or "qlora"; "" where it cannot be known.
        status: how it ended, or that it runs.
        begun: when its config was written, as local time.
        checkpoint: the step of the newest checkpoint; None if there is none.
    """

    name: str
    kind: str
    status: str
    begun: str
    steps: int
    loss: float | None
    best_held_out_loss: float | None
    elapsed_s: float | None
    checkpoint: int | None


def is_run(folder: Path) -> bool:
    """Return whether a folder looks like one that training wrote."""
    run = RunFolder(folder)
    return folder.is_dir() and (run.metrics.exists() or run.checkpoints.is_dir() or run.config.exists())


def list_runs(runs_dir: Path) -> list[Overview]:
    """Describe every run in `runs_dir`, the newest last; none if there is no such folder.

    Raises: MachineError if the folder cannot be read.
    """
    ordered = sorted(_runs_in(runs_dir), key=lambda folder: (_begun_s(folder), folder.name))
    return [describe(folder) for folder in ordered]


def _runs_in(runs_dir: Path) -> list[Path]:
    if not runs_dir.is_dir():
        return []
    try:
        return [folder for folder in runs_dir.iterdir() if is_run(folder)]
    except OSError as error:
        raise MachineError(f"{runs_dir} cannot be read: {error.strerror}; see to its permissions") from error


def find_run(runs_dir: Path, name: str) -> Path:
    """Return the folder of a run, given by its name in `runs_dir` or by its path.

    Raises: DataError, naming the runs there are.
    """
    for folder in (runs_dir / name, Path(name)):
        if is_run(folder):
            return folder
    there = ", ".join(run.name for run in list_runs(runs_dir)) or "none"
    raise DataError(f"{runs_dir} has no run {name!r}; the runs there are: {there}")


def newest_run(runs_dir: Path) -> Path:
    """Return the folder of the run that wrote something last.

    Raises: DataError if there is none; MachineError if the folder cannot be read.
    """
    folders = _runs_in(runs_dir)
    if not folders:
        raise DataError(f"no runs in {runs_dir}; `entrenar quickstart` makes the first one")
    return max(folders, key=lambda folder: (_written_s(folder), folder.name))


def describe(folder: Path) -> Overview:
    """Describe one run, whatever state its folder is in."""
    run = RunFolder(folder)
    newest = max(list_checkpoints(run.checkpoints), default=None)
    begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(_begun_s(folder)))
    live = "runs now" if is_held(run.lock) else ""
    nothing = Overview(folder.name, "", live, begun, 0, None, None, None, newest)
    try:
        history = read_history(folder)
    except DataError:
        return replace(nothing, status=live or "no step was taken")
    except (EntrenarError, OSError, ValueError) as error:
        return replace(nothing, status=live or f"cannot be read: {error}")
    best = history.best
    return Overview(
        name=folder.name,
        kind=str(history.config.get("method", "pre-training" if history.config else "")),
        status=live or _ending(history),
        begun=begun,
        steps=history.num_steps,
        loss=history.smooth[-1] if math.isfinite(history.smooth[-1]) else None,
        best_held_out_loss=None if best is None or best.held_out is None else best.held_out["loss"],
        elapsed_s=history.last.elapsed_s,
        checkpoint=newest,
    )


def remove(folder: Path) -> None:
    """Delete a run.

    Raises:
        MachineError: a process trains there, or the folder cannot be deleted.
        ConfigError: it is no run's folder.
    """
    if not is_run(folder) or folder.is_symlink():
        raise ConfigError(f"{folder} is not a run's folder, so nothing in it is deleted")
    check_free(RunFolder(folder).lock, str(folder))
    with explained_disk_errors(folder):
        shutil.rmtree(folder)


def _ending(history: History) -> str:
    """Say how a run ended, from its last record, its limits and its events; a killed run leaves no word."""
    if any(event.kind in _ALARMS and event.step >= history.num_steps for event in history.events):
        return f"stopped by an alarm at step {history.num_steps:,}"
    limits = history.config.get("train", {})
    if any(_reached(limits, history)):
        return "complete"
    return f"stopped at step {history.num_steps:,}"


def _reached(limits: Mapping[str, Any], history: History) -> Iterator[bool]:
    last = history.last
    for limit, value in (
        ("max_steps", history.num_steps),
        ("max_time_s", last.elapsed_s),
        ("epochs", last.epoch),
    ):
        most = limits.get(limit)
        yield isinstance(most, int | float) and value is not None and value >= most


def _begun_s(folder: Path) -> float:
    run = RunFolder(folder)
    return _changed_s(run.config, run.metrics, folder)


def _written_s(folder: Path) -> float:
    run = RunFolder(folder)
    return _changed_s(run.metrics, run.config, folder)


def _changed_s(*paths: Path) -> float:
    """Return when the first of the paths that is there was changed."""
    for path in paths:
        try:
            return path.stat().st_mtime
        except OSError:
            continue
    return 0.0
