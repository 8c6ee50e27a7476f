"""What each session of a run ran on: a line in sessions.jsonl as it begins, and one as it ends, with its peak memory.

The report shows them. A session that was killed has no end, and its line says what it ran on all the same.
"""

import json
import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from entrenar.errors import MachineError
from entrenar.files import explained_disk_errors
from entrenar.memory import status_bytes
from entrenar.runs import RunFolder
from entrenar.train import World, git_revision
from entrenar.train.replay import machine
from entrenar.version import __version__

_log = logging.getLogger("entrenar.sessions")


@contextmanager
def recorded_session(run: RunFolder, device: torch.device, world: World) -> Iterator[None]:
    """Write down what a session runs on, and at its end the most memory that the process held.

    Raises: DiskFullError, MachineError before the session begins; no run ends because its peak cannot be noted.
    """
    _append(run.sessions, {"event": "begun", **describe(device, world)})
    yield
    try:
        _append(run.sessions, {"event": "ended", "at": _now(), "peak_bytes": status_bytes("VmHWM")})
    except MachineError as error:
        _log.warning("%s", error)


def describe(device: torch.device, world: World) -> dict[str, Any]:
    """Return the versions and the machine of this process."""
    return {
        "at": _now(),
        "entrenar": __version__,
        "python": platform.python_version(),
        **machine(world.size),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "git_revision": git_revision(),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _append(path: Path, line: dict[str, Any]) -> None:
    with explained_disk_errors(path), path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
