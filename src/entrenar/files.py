"""Write files so that a crash at any instant leaves the old content or the new, never a mixture.

The order is the classical one (Pillai et al. 2014, "All File Systems Are Not Created Equal"): write a temporary
file in the same folder, fsync it, rename it over the target, fsync the folder. A folder is committed the same way,
by the rename of a sibling.
"""

import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from entrenar.errors import DiskFullError, FormatError, MachineError

TEMPORARY_PREFIX = ".incomplete-"
_ASIDE_PREFIX = ".replaced-"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_HASH_BLOCK_BYTES = 1 << 20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fsync_directory(path: Path) -> None:
    """Make the entries of folder `path` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Make the content of `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained_disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError raised while writing `path` into our own error.

    Raises: DiskFullError when space, quota or the file-size limit ran out; MachineError for every other reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise DiskFullError(
                f"no space left to write {path} ({error.strerror}); free space and try again"
            ) from error
        raise MachineError(f"cannot write {path}: {error.strerror or error}; see that it can be written") from error


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replace the content of `path` in one step.

    Raises: DiskFullError, MachineError; the old content is then intact.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with explained_disk_errors(path), _replacing(path) as temporary, temporary.open("wb") as stream:
        stream.write(data)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` by one rename when the block ends without an error.

    Every file in it is fsynced first. A folder already at `path` is replaced.
    On an error nothing is left behind; what an earlier process left that was killed is removed.

    Raises: DiskFullError, MachineError.
    """
    with explained_disk_errors(path):
        _make_durable_parents(path.parent)
        with _temporary(path, Path.mkdir) as temporary:
            yield temporary
            _fsync_tree(temporary)
            _replace_directory(temporary, path)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the path of a temporary file, to be written in any way, that becomes `path` as `atomic_directory` does.

    Raises: DiskFullError, MachineError.
    """
    with explained_disk_errors(path):
        _make_durable_parents(path.parent)
        with _replacing(path) as temporary:
            yield temporary


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    with _temporary(path, Path.touch) as temporary:
        yield temporary
        fsync_file(temporary)
        temporary.replace(path)
        fsync_directory(path.parent)


@contextmanager
def _temporary(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a new sibling of `path`, locked while it is in use, and remove it if it is still there at the end."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")
    with _locked(path.parent) as is_ours:  # so that nobody finds it before it is locked
        if is_ours:
            _remove_abandoned(path)
        make(temporary)
        descriptor = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        _lock(descriptor)
    try:
        yield temporary
    finally:
        os.close(descriptor)
        _delete(temporary)


def _remove_abandoned(path: Path) -> None:
    """Remove what processes that were killed had begun to write for `path`; put back what they had moved aside."""
    aside = path.with_name(f"{_ASIDE_PREFIX}{path.name}")
    if aside.exists() and not path.exists():
        aside.rename(path)
    elif aside.exists():
        _delete(aside)
    for leftover in path.parent.glob(f"{TEMPORARY_PREFIX}{glob.escape(path.name)}-????????"):
        with _locked(leftover) as is_abandoned:
            if is_abandoned:
                _delete(leftover)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of a file or folder, and say whether it could be had: not if another process uses it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # what is left will be removed by the next writer
            path.unlink(missing_ok=True)


def _make_durable_parents(folder: Path) -> None:
    if not folder.is_dir():
        _make_durable_parents(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync_directory(folder.parent)


def _fsync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            fsync_file(Path(folder) / name)
        fsync_directory(Path(folder))


def _replace_directory(temporary: Path, path: Path) -> None:
    """Put `temporary` at `path`; a folder already there is swapped into `temporary` or deleted."""
    if not path.exists():
        temporary.rename(path)
        fsync_directory(path.parent)
    elif _exchange(temporary, path):
        fsync_directory(path.parent)
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        # rename(2) cannot replace a non-empty folder. Between the two renames a crash leaves the old folder aside,
        # where `remove_incomplete` finds it and puts it back.
        aside = path.with_name(f"{_ASIDE_PREFIX}{path.name}")
        path.rename(aside)
        temporary.rename(path)
        fsync_directory(path.parent)
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step if kernel and file system can (renameat2, Linux); return whether they were swapped."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


def remove_incomplete(parent: Path) -> list[Path]:
    """Clean up after interrupted writes in `parent`: put back folders that were moved aside, delete the rest.

    Must not run while another process writes there. Returns the deleted paths.
    """
    if not parent.is_dir():
        return []
    for aside in parent.glob(f"{_ASIDE_PREFIX}*"):
        target = aside.with_name(aside.name.removeprefix(_ASIDE_PREFIX))
        aside.rename(target if not target.exists() else aside.with_name(f"{TEMPORARY_PREFIX}{aside.name}"))
    leftovers = sorted(parent.glob(f"{TEMPORARY_PREFIX}*"))
    for leftover in leftovers:
        _delete(leftover)
    return leftovers


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's content, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON in one step."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises: FormatError for text that is not UTF-8 JSON; OSError.
    """
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    # json raises plain ValueError for integers over 4,300 digits and RecursionError for deep nesting.
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}") from error
