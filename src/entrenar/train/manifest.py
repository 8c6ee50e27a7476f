"""The manifest of a checkpoint: what every file in it must be, and a hash of itself.

It is read with suspicion: it may be cut, edited, of another version, or name files outside the checkpoint, and where a
file should be there may be a pipe, on which a read would wait for ever.
"""

import errno
import hashlib
import json
import math
import stat
from collections.abc import Collection, Mapping
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from entrenar.errors import CheckpointError, FormatError
from entrenar.files import read_json, sha256_file, write_json
from entrenar.runs import MODEL_FOLDER

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"


def write_manifest(folder: Path, content: Mapping[str, Any], known: Mapping[str, Any] | None = None) -> None:
    """Write the manifest of all files in `folder`, with `content` beside them; `known` are entries made elsewhere."""
    files = dict(known or {})
    for file in sorted(folder.rglob("*")):
        if file.is_file() and (name := file.relative_to(folder).as_posix()) not in files:
            files[name] = {"size": file.stat().st_size, "sha256": sha256_file(file)}
    manifest = {"version": FORMAT_VERSION, **content, "files": files}
    write_json(folder / MANIFEST, manifest | {"manifest_sha256": _hash(manifest)})


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest and check it against its own hash.

    Raises: CheckpointError when it is missing, damaged or of a version this program does not know.
    """
    try:
        if not stat.S_ISREG((path / MANIFEST).lstat().st_mode):  # a pipe would be read for ever
            raise CheckpointError(f"{path} has no readable manifest: {MANIFEST} is no regular file")
        manifest = read_json(path / MANIFEST)
    except (OSError, FormatError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            raise
        raise CheckpointError(f"{path} has no readable manifest: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("manifest_sha256") != _hash(manifest):
        raise CheckpointError(f"{path / MANIFEST} is damaged: its content does not match its own sha256")
    if manifest.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has checkpoint format {manifest.get('version')}, this program reads {FORMAT_VERSION}; "
            "use the version that wrote it"
        )
    if fault := _fault(manifest):
        raise CheckpointError(f"{path / MANIFEST} is not what this program writes: {fault}")
    return manifest


def _fault(manifest: Mapping[str, Any]) -> str | None:
    """Say what a manifest lacks, or which of its names leads out of the checkpoint."""
    step, loss, files = manifest.get("step"), manifest.get("held_out_loss"), manifest.get("files")
    if type(step) is not int or step < 0:
        return f"step must be a whole number, got {step!r:.100}"
    if loss is not None and (type(loss) not in (int, float) or not math.isfinite(loss)):
        return f"held_out_loss must be a number or null, got {loss!r:.100}"
    if not isinstance(files, dict):
        return f"files must be a table of names, got {files!r:.100}"
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or PurePosixPath(name).is_absolute():
            return f"file {name!r} lies outside the checkpoint"
        if (
            not isinstance(entry, dict)
            or type(entry.get("size")) is not int
            or not isinstance(entry.get("sha256"), str)
        ):
            return f"{name} needs a size and a sha256, got {entry!r:.100}"
    missing = [] if any(is_optimizer(name) for name in files) else [OPTIMIZER]
    missing += [] if STATE in files else [STATE]
    if not any(name.startswith(f"{MODEL_FOLDER}/") for name in files):
        missing.append(f"{MODEL_FOLDER}/")
    return f"it lists no {missing[0]}" if missing else None


def is_optimizer(name: str) -> bool:
    """Return whether a file of a checkpoint holds tensors of the optimizer: all, or the share of one rank."""
    return fnmatch(name, "optimizer*.safetensors")


def optimizer_files(path: Path) -> list[Path]:
    """Return the files of the optimizer in the checkpoint `path`."""
    return sorted(path.glob("optimizer*.safetensors")) or [path / OPTIMIZER]


def faults_of_files(path: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Say which files of the checkpoint `path` are missing, truncated, altered, or not in its manifest."""
    listed = manifest["files"]
    if links := [one.name for one in (path, *sorted(path.rglob("*"))) if one.is_symlink() and one.is_dir()]:
        return [f"{links[0]} is a link to a folder elsewhere"]
    faults = [fault for name, expected in listed.items() if (fault := _fault_of_file(path / name, name, expected))]
    return faults + [f"{name} is not in the manifest" for name in _unlisted(path, listed)]


def _fault_of_file(file: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode):
            return f"{name} is no regular file"
        if (size := status.st_size) != expected["size"]:
            return f"{name} has {size} bytes instead of {expected['size']}"
        return None if sha256_file(file) == expected["sha256"] else f"{name} does not match its sha256"
    except OSError as error:
        if error.errno == errno.ENOMEM:  # the machine's fault, not the file's
            raise
        return f"{name} cannot be read ({error.strerror})"


def _unlisted(path: Path, listed: Collection[str]) -> list[str]:
    """Return what lies in the folder and nobody vouches for; hidden files are left to those who hide them."""
    names = (file.relative_to(path).as_posix() for file in sorted(path.rglob("*")) if not file.is_dir())
    return [name for name in names if name not in listed and name != MANIFEST and not Path(name).name.startswith(".")]


def fault_of_state(state: Any, step: int) -> str | None:
    """Say what the state of step `step` lacks; None if a run can be resumed from it."""
    kinds = {"counters": dict, "rng": dict, "monitor": dict, "config": dict}
    if not isinstance(state, dict):
        return f"it must be a table, got {state!r:.100}"
    for key, kind in kinds.items():
        if not isinstance(state.get(key), kind):
            return f"{key} must be a table, got {state.get(key)!r:.100}"
    needed = {
        "rng": ("python", "numpy", "torch", "cuda"),
        "monitor": ("windows", "dead_steps", "slow_steps", "skipped_steps"),
    }
    missing = [f"{key}.{part}" for key, parts in needed.items() for part in parts if part not in state[key]]
    if missing := [*missing, *(key for key in ("loader", "rows") if key not in state)]:
        return f"{missing[0]} is missing"
    if state["counters"].get("step") != step:
        return f"its step is {state['counters'].get('step')!r:.100}, the manifest's {step}"
    return None


def _hash(manifest: Mapping[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
