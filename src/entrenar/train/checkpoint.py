"""A checkpoint is a folder that is complete or absent, and can prove it.

    step-00000100/
      manifest.json          format version, step, held-out loss, size and sha256 of every other file, sha256 of itself
      model/                 a Hugging Face folder or a PEFT adapter, written by the caller
      optimizer.safetensors  moments, step count, low halves of float32 masters (the high halves are the bfloat16
                             model); several numbered files if several ranks wrote it (`joint`)
      state.json             random states, loader position, counters, monitor windows, config, git revision

It is committed by one rename after everything is durable (`files.atomic_directory`). Both safetensors and torch
load almost every file with one flipped bit without a word, so `load` checks all hashes first. No manifest, no
checkpoint; never pickle.
"""

import logging
import re
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from entrenar.errors import CheckpointError, FormatError
from entrenar.files import (
    TEMPORARY_PREFIX,
    atomic_directory,
    explained_disk_errors,
    fsync_directory,
    read_json,
    write_json,
)
from entrenar.runs import MODEL_FOLDER, checkpoint_name, list_checkpoints
from entrenar.train.manifest import (
    OPTIMIZER,
    STATE,
    fault_of_state,
    faults_of_files,
    optimizer_files,
    read_manifest,
    write_manifest,
)
from entrenar.train.oom import explained_oom, is_oom
from entrenar.train.pieces import fill

_OS_ERROR = re.compile(r"os error (\d+)")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """The live tensors to save, and the small state as JSON values."""

    step: int
    weights: Mapping[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    held_out_loss: float | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with every byte verified; `skipped` says why newer ones were not taken."""

    path: Path
    step: int
    state: dict[str, Any]
    skipped: tuple[str, ...] = ()

    @property
    def model(self) -> Path:
        """Folder of the model or adapter."""
        return self.path / MODEL_FOLDER

    @property
    def loader_state(self) -> dict[str, Any] | None:
        """The loader's position after the last step; None before the first."""
        position: dict[str, Any] | None = self.state["loader"]
        return position

    def optimizer(self) -> dict[str, Tensor]:
        """Read the optimizer's tensors."""
        return {name: tensor for file in optimizer_files(self.path) for name, tensor in load_file(file).items()}


def write(
    path: Path,
    snapshot: Snapshot,
    write_model: Callable[[Path, Mapping[str, Tensor]], None],
    *,
    staged: Callable[[], None],
    before_commit: Callable[[], None],
) -> None:
    """Write `snapshot` to the checkpoint folder `path`.

    Calls `staged` as soon as the snapshot's tensors are no longer read, and `before_commit` just before the rename.

    Raises: DiskFullError, MachineError; the folder then does not exist, and other checkpoints are untouched.
    """
    with atomic_directory(path) as folder:
        try:
            _stage(folder, snapshot, write_model)
        finally:
            staged()
        write_manifest(folder, facts_of(snapshot))
        before_commit()


def facts_of(snapshot: Snapshot) -> dict[str, Any]:
    """Return what a manifest says of a snapshot, besides its files."""
    return {
        "step": snapshot.step,
        "held_out_loss": snapshot.held_out_loss,
        "git_revision": snapshot.state.get("git_revision"),
        "code": snapshot.state.get("code"),
    }


def _stage(folder: Path, snapshot: Snapshot, write_model: Callable[[Path, Mapping[str, Tensor]], None]) -> None:
    (folder / MODEL_FOLDER).mkdir()
    with _with_errno():
        write_model(folder / MODEL_FOLDER, snapshot.weights)
    save_tensors(folder / OPTIMIZER, snapshot.optimizer)
    write_json(folder / STATE, snapshot.state)


@contextmanager
def _with_errno() -> Iterator[None]:
    """Give back the errno that safetensors hides in its sentence, so that "disk full" is recognized as such."""
    try:
        yield
    except SafetensorError as error:
        if code := _OS_ERROR.search(str(error)):
            raise OSError(int(code[1]), str(error)) from error
        raise


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file of tensors.

    Raises: OSError.
    """
    path.touch()
    mode = path.stat().st_mode
    with _with_errno():
        save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)  # the library's own lets no one else read the file


def verify(path: Path) -> dict[str, Any]:
    """Check every file of the checkpoint `path` against its manifest, and return the manifest.

    Raises: CheckpointError, naming every missing, truncated or altered file.
    """
    manifest = read_manifest(path)
    if faults := faults_of_files(path, manifest):
        raise CheckpointError(f"{path} is damaged: {'; '.join(faults)}")
    return manifest


def load(path: Path) -> Checkpoint:
    """Verify the checkpoint `path` and read its small state.

    Raises: CheckpointError; OutOfMemoryError, because a checkpoint that does not fit into memory now is not damaged.
    """
    with explained_oom(f"reading the checkpoint {path}; close other programs, and resume again"):
        return _load(path)


def _load(path: Path) -> Checkpoint:
    manifest = verify(path)
    step = manifest["step"]
    if path.name != checkpoint_name(step) and path.name.startswith("step-"):
        raise CheckpointError(
            f"{path} holds step {step}: a copy under another name; give it back the name "
            f"{checkpoint_name(step)} to resume from it"
        )
    try:
        state = read_json(path / STATE)
        names = set()
        for file in optimizer_files(path):
            with safe_open(file, "pt") as optimizer:
                names.update(optimizer.keys())
    except (OSError, FormatError, SafetensorError) as error:
        if is_oom(error):
            raise
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if fault := fault_of_state(state, step):
        raise CheckpointError(f"{path / STATE} is not what this program writes: {fault}")
    if "step" not in names:
        raise CheckpointError(f"{path / OPTIMIZER} is not what this program writes: it holds no step count")
    return Checkpoint(path=path, step=step, state=state)


def latest_good(folder: Path, *, among: Collection[int] | None = None) -> Checkpoint:
    """Return the newest intact checkpoint in `folder`; damaged newer ones are logged and listed in its `skipped`.

    `among` are the steps to choose from, all if not given.

    Raises: CheckpointError when there is none.
    """
    skipped: list[str] = []
    found = list_checkpoints(folder)
    for path in reversed([path for step, path in found.items() if among is None or step in among]):
        try:
            good = load(path)
        except CheckpointError as error:
            _log.warning("skipping checkpoint: %s", error)
            skipped.append(str(error))
        else:
            return Checkpoint(good.path, good.step, good.state, tuple(skipped))
    reasons = "; ".join(skipped) or "there are none"
    raise CheckpointError(f"no whole checkpoint in {folder}: {reasons}; start a new run or restore a copy")


def prune(folder: Path, *, newest: int, keep_last: int, keep_best: bool) -> None:
    """Delete checkpoints up to step `newest`, except the last `keep_last` and, if `keep_best`, the best held-out loss.

    A checkpoint with a damaged manifest does not count as kept. `newest` itself always stays.
    """
    manifests: dict[int, dict[str, Any]] = {}
    paths = {step: path for step, path in list_checkpoints(folder).items() if step <= newest}
    for step, path in paths.items():
        try:
            manifests[step] = read_manifest(path)
        except CheckpointError as error:
            _log.warning("checkpoint is not counted: %s", error)
    kept = {newest, *sorted(manifests)[-keep_last:]}
    losses = {step: m["held_out_loss"] for step, m in manifests.items() if m["held_out_loss"] is not None}
    if keep_best and losses:
        kept.add(min(losses, key=losses.__getitem__))
    for step in paths.keys() - kept:
        remove(paths[step])


def remove(path: Path) -> None:
    """Delete a checkpoint so that a crash half-way leaves no damaged one behind.

    Raises: MachineError.
    """
    doomed = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-removed")
    shutil.rmtree(doomed, ignore_errors=True)
    with explained_disk_errors(path):
        path.rename(doomed)
        fsync_directory(path.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def move(path: Path, folder: Path) -> None:
    """Move a checkpoint into `folder`, in the place of one of its name.

    Raises: MachineError.
    """
    with explained_disk_errors(path):
        folder.mkdir(exist_ok=True)
        shutil.rmtree(folder / path.name, ignore_errors=True)
        path.rename(folder / path.name)
        fsync_directory(path.parent)
        fsync_directory(folder)


def abandon_after(folder: Path, step: int) -> list[Path]:
    """Rename checkpoints newer than `step` to `abandoned-…`, so that no later resume continues from them."""
    newer = [path for number, path in list_checkpoints(folder).items() if number > step]
    with explained_disk_errors(folder):
        abandoned = [_renamed(path, path.with_name(f"abandoned-{path.name}")) for path in newer]
        if abandoned:
            fsync_directory(folder)
    return abandoned


def _renamed(path: Path, target: Path) -> Path:
    if target.exists():
        shutil.rmtree(target)
    return path.rename(target)


def check_same_config(
    saved: Mapping[str, Any],
    current: Mapping[str, Any],
    *,
    may_differ: Collection[str] = (),
    fixed: Collection[str] = (),
    is_change_allowed: bool = False,
) -> None:
    """Compare a checkpoint's config with the one to resume under.

    `may_differ` and `fixed` are dotted keys: those that may always change, and those that never may, because the
    checkpoint's tensors or its place in the data depend on them. The keys of a value that is a table itself, such as
    rank_pattern, count as that value.

    Raises: CheckpointError, showing every difference.
    """
    before, now = dict(_leaves(saved)), dict(_leaves(current))
    missing = object()
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if key not in may_differ and before.get(key, missing) != now.get(key, missing)
    ]
    never = [key for key in changed if key in fixed or any(key.startswith(f"{table}.") for table in fixed)]
    if not (never if is_change_allowed else changed):
        return
    shown = "\n  ".join(f"{key}: {_show(before, key)} -> {_show(now, key)}" for key in changed)
    remedy = "or allow the change (--allow-config-changes)"
    if never:
        remedy = f"or start another run (--name): the checkpoint belongs to its own {', '.join(never)}"
    raise CheckpointError(
        f"the checkpoint was made with another config:\n  {shown}\nresume with the config it was made with, {remedy}"
    )


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value


def _show(leaves: Mapping[str, Any], key: str) -> str:
    return repr(leaves[key]) if key in leaves else "(absent)"


def restore_weights(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy the weights of a checkpoint into the trained parameters `own`, byte for byte.

    Raises: CheckpointError when one is missing or has another shape or type.
    """
    for name, tensor in own.items():
        if name not in saved:
            raise CheckpointError(f"the checkpoint's model has no weight {name}; it belongs to another model")
        other = saved[name]
        if (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
            raise CheckpointError(
                f"weight {name} must be {tensor.dtype} {tuple(tensor.shape)}, "
                f"the checkpoint holds {other.dtype} {tuple(other.shape)}"
            )
        fill(tensor, other)


def git_revision() -> str | None:
    """Return the commit checked out in the working folder, `+dirty` if it has changes; None outside a repository."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+dirty" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
