"""Prepare what every training run needs before it starts: observers, a device, a run folder."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from entrenar.config import AnyConfig
from entrenar.config_file import to_toml
from entrenar.data import Progress
from entrenar.errors import CheckpointError, ConfigError
from entrenar.files import atomic_write, explained_disk_errors
from entrenar.runs import Event, RunFolder, StepRecord, list_checkpoints
from entrenar.train import Checkpoint, latest_good


@dataclass(frozen=True)
class Observer:
    """Who is told what happens: the command line prints it."""

    on_stage: Callable[[str], None] = lambda _: None
    on_record: Callable[[StepRecord], None] = lambda _: None
    on_event: Callable[[Event], None] = lambda _: None
    on_prepare: Callable[[Progress], None] = lambda _: None


def choose_device(config: AnyConfig) -> torch.device:
    """Return the device that the config names, or the best there is.

    Raises:
        ConfigError: the machine has no such device.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device must be one this machine has, got \'cuda\'; set device = "cpu" or "auto"')
    return torch.device(config.device)


def find_checkpoint(run_dir: Path, *, resume: bool, overwrite: bool) -> Checkpoint | None:
    """Return the checkpoint to go on from; None for a new run, whose place is free or may be cleared.

    Raises:
        CheckpointError: there is nothing to resume.
        ConfigError: a run of that name is there already, or is to be both resumed and overwritten.
    """
    checkpoints = RunFolder(run_dir).checkpoints
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; leave one out")
    if resume:
        if not run_dir.is_dir():
            raise CheckpointError(f"there is no run at {run_dir} to resume; start it without --resume")
        return latest_good(checkpoints)
    if list_checkpoints(checkpoints) and not overwrite:
        raise ConfigError(
            f"{run_dir} already holds a run; go on with it by --resume, replace it by --overwrite, "
            "or choose another --name"
        )
    return None


def open_run_folder(config: AnyConfig, *, overwrite: bool, kept: str = "") -> None:
    """Make the run's folder and write the config into it; `overwrite` first deletes what an earlier run left there.

    Files whose name ends in `kept` stay. Called once all else has been checked: a fault in the new run must not cost
    the old one.

    Raises:
        DiskFullError, MachineError.
    """
    with explained_disk_errors(config.run_dir):
        if overwrite and config.run_dir.is_dir():
            for old in config.run_dir.iterdir():
                if old.is_dir() and not old.is_symlink():
                    shutil.rmtree(old)
                elif not kept or not old.name.endswith(kept):
                    old.unlink()
        config.run_dir.mkdir(parents=True, exist_ok=True)
    atomic_write(RunFolder(config.run_dir).config, to_toml(config))


def recorded(config: AnyConfig) -> dict[str, Any]:
    """Return the config as checkpoints remember it."""
    values: dict[str, Any] = config.model_dump(mode="json", exclude={"preset"})
    return values


def recorded_compute_dtype(checkpoint: Checkpoint | None) -> str | None:
    """Return the compute dtype that a run recorded, if there is one to resume."""
    return None if checkpoint is None else checkpoint.state["config"]["compute_dtype"]
