"""Find out at the start whether all ranks train the same run; a difference would otherwise show as a wrong model.

Every check ends on every rank with the same error, so no rank is left waiting.
"""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entrenar.errors import ConfigError
from entrenar.files import atomic_write
from entrenar.train import World

_MISSING = "not there"


def gather(world: World, value: Any) -> list[Any]:
    """Return the `value` of every rank, by rank; JSON must be able to hold it."""
    return world.gather(value)


def check_same(world: World, facts: Mapping[str, Any]) -> None:
    """Check that `facts` are the same on all ranks; what nests is compared by dotted key.

    Raises: ConfigError, on every rank, that names the first difference and both ranks.
    """
    if world.size == 1:
        return
    first, *others = gather(world, _flat(facts))
    for rank, other in enumerate(others, start=1):
        for key in sorted(first.keys() | other.keys()):
            here, there = first.get(key, _MISSING), other.get(key, _MISSING)
            if here != there:
                raise ConfigError(
                    f"all ranks must train the same run, but {key} is {here!r:.100} on rank 0 and {there!r:.100} on "
                    f"rank {rank}; give every rank the same command, files and versions"
                )


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in facts.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def check_shared(world: World, folder: Path) -> None:
    """Check that the writer's `folder` is on storage that every rank sees.

    Raises: ConfigError, on every rank, that names a rank that does not see it.
    """
    if world.size == 1:
        return
    token = world.broadcast(uuid.uuid4().hex)
    path = folder / f"token-{token}"
    if world.is_writer:
        atomic_write(path, token)
    world.any(flag=False)  # wait until the token is written
    sees = gather(world, path.is_file())
    if world.is_writer:
        path.unlink()
    if not all(sees):
        raise ConfigError(
            f"{folder} must be on storage that all ranks share, but rank {sees.index(False)} does not see what rank 0 "
            "wrote there; set runs_dir to shared storage"
        )
