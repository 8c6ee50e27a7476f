"""Take a step again whose alarm stopped a run, and compare: is it the data and the arithmetic, or the machine?"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrenar.config_file import ConfigFile, load_config, load_finetune_config
from entrenar.errors import ConfigError
from entrenar.recipe.finetune import finetune_in
from entrenar.recipe.pretrain import train_in
from entrenar.recipe.start import Mode, Observer, StepTaken
from entrenar.runs import RunFolder
from entrenar.train.replay import Bundle, differing, figures_by_name, machine


@dataclass(frozen=True)
class Replay:
    """A step that was taken again.

    Attributes:
        figures: what was found now, by the names of the bundle's.
        are_batches_same: whether the data of the step are what they were.
        differing: the names of figures whose bits differ.
        machine_changes: what the bits may depend on and has changed: name, then, now.
    """

    bundle: Bundle
    figures: Mapping[str, float]
    are_batches_same: bool
    differing: tuple[str, ...]
    machine_changes: tuple[tuple[str, Any, Any], ...]


def replay(path: Path, observer: Observer | None = None) -> Replay:
    """Take the step of the bundle at RUN/replay/FILE again; the run's folder is as before.

    Raises:
        ConfigError: no run is around the bundle, several ranks took the step, or the base was rounded for the run and
            no checkpoint holds it yet.
        FormatError, DataError, CheckpointError, MachineError: bundle, data or checkpoint cannot be used.
    """
    bundle = Bundle.read(path)
    file = RunFolder(path.resolve().parent.parent).config
    if not file.is_file():
        raise ConfigError(f"{path} must lie in RUN/replay of its run, but there is no {file}")
    ranks = bundle.machine.get("ranks", 1)
    if ranks != 1:
        raise ConfigError(f"{path} is of a step of {ranks} ranks; only a step of one process can be taken again")
    folder = {"name": file.parent.name, "runs_dir": str(file.parent.parent)}
    mode = Mode(replay=path)
    try:
        if "sft" in ConfigFile.read(file).values:
            finetune_in(load_finetune_config(file, folder), mode, observer or Observer())
        else:
            train_in(load_config(file, folder), mode, observer or Observer())
    except StepTaken as taken:
        figures, batches = figures_by_name(taken.figures), taken.batches
    now = machine(1)
    changes = tuple((name, then, now.get(name)) for name, then in bundle.machine.items() if then != now.get(name))
    different = tuple(differing(bundle.figures, figures))
    return Replay(bundle, figures, batches == bundle.batches, different, changes)
