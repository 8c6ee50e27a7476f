"""Find the commit that a training checkpoint was made at: its manifest names it."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrenar.errors import ConfigError, FormatError
from entrenar.files import read_json
from entrenar.quality.git import Repository

_STEP = re.compile(r"(?:step|checkpoint)-0*(\d+)")
_DIRTY = "+dirty"
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Named:
    """A commit, and whether the work tree had uncommitted changes when it was named."""

    commit: str
    is_dirty: bool = False


def resolve(repository: Repository, name: str, runs: Path) -> Named:
    """Return the commit of a git revision or of a checkpoint: its folder, or its name below `runs`.

    Raises: ConfigError if neither git nor the runs know the name, or several runs do.
    """
    found = _folders(name, runs)
    try:
        return Named(repository.resolve(name))
    except ConfigError as unknown:
        if not found:
            raise ConfigError(f"{unknown}; nor is there a checkpoint of that name in {runs}") from unknown
    if len(found) > 1:
        raise ConfigError(f"{name} names {len(found)} checkpoints: {', '.join(map(str, found))}; give the folder")
    return _named(repository, found[0])


def _folders(name: str, runs: Path) -> list[Path]:
    if (Path(name) / _MANIFEST).is_file():
        return [Path(name)]
    step = _STEP.fullmatch(name)
    return [] if step is None else sorted(runs.glob(f"*/checkpoints/step-{int(step[1]):08d}"))


def _named(repository: Repository, folder: Path) -> Named:
    try:
        manifest: Any = read_json(folder / _MANIFEST)
        revision = manifest.get("git_revision")
    except (OSError, AttributeError) as fault:
        raise FormatError(f"{folder} has no readable {_MANIFEST}: {fault}") from fault
    if not isinstance(revision, str):
        raise ConfigError(f"{folder} names no git revision: it was made outside of a repository")
    return Named(repository.resolve(revision.removesuffix(_DIRTY)), revision.endswith(_DIRTY))
