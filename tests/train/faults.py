"""Let the n-th file operation of a process fail: once, or from then on, as SQLite tests itself.

Every open, write, fsync, rename, replace, mkdir, unlink, rmdir and truncate below a folder counts; a library in another
language counts as one. The kernel is not asked: the call raises the error in its place, or writes a part and raises.
"""

import builtins
import errno
import io
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import train_toy
from safetensors import SafetensorError

from entrenar.train import checkpoint

KINDS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EDQUOT": errno.EDQUOT, "EROFS": errno.EROFS}
_PATHS = ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "truncate")


@dataclass
class Faults:
    """Counts operations below `folder`, and fails number `at` with `number`; all later ones too if `is_lasting`."""

    folder: Path
    at: int
    number: int
    is_lasting: bool
    seen: int = 0
    failed: list[str] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def strikes(self, name: str, path: object) -> bool:
        """Count an operation, and say whether it fails."""
        if isinstance(path, int | str | os.PathLike) and not self._is_below(path):
            return False
        with self.lock:
            self.seen += 1
            is_struck = self.seen == self.at or (self.is_lasting and self.seen > self.at)
            if is_struck:
                self.failed.append(f"{name} {path}")
        return is_struck

    def error(self, path: object) -> OSError:
        """Return the error of the system."""
        return OSError(self.number, os.strerror(self.number), str(path))

    def _is_below(self, path: int | str | os.PathLike[str]) -> bool:
        if isinstance(path, int):
            try:
                path = Path(f"/proc/self/fd/{path}").readlink()
            except OSError:
                return False
        return str(self.folder) in str(Path(path).absolute())


class _Stream:
    """A file whose writes count; a write that fails has written the first half."""

    def __init__(self, stream: Any, faults: Faults, path: object) -> None:
        self._stream, self._faults, self._path = stream, faults, path

    def write(self, content: Any) -> int:
        if self._faults.strikes("write", self._path):
            self._stream.write(content[: len(content) // 2])
            raise self._faults.error(self._path)
        return int(self._stream.write(content))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._stream)


@contextmanager
def failing(faults: Faults) -> Iterator[None]:
    """Let operations of this process fail inside the block."""
    with ExitStack() as stack:
        for name in _PATHS:
            stack.enter_context(mock.patch.object(os, name, _wrapped(getattr(os, name), name, faults)))
        stack.enter_context(mock.patch.object(os, "fsync", _wrapped(os.fsync, "fsync", faults)))
        stack.enter_context(mock.patch.object(io, "open", _opening(builtins.open, faults)))
        for module in (checkpoint, train_toy):
            stack.enter_context(mock.patch.object(module, "save_file", _saving(module.save_file, faults)))
        yield


def _wrapped(call: Callable[..., Any], name: str, faults: Faults) -> Callable[..., Any]:
    def run(path: Any, *arguments: Any, **named: Any) -> Any:
        if faults.strikes(name, path):
            raise faults.error(path)
        return call(path, *arguments, **named)

    return run


def _opening(call: Callable[..., Any], faults: Faults) -> Callable[..., Any]:
    def run(path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if not any(letter in mode for letter in "wax+"):
            return call(path, mode, *arguments, **named)
        if faults.strikes("open", path):
            raise faults.error(path)
        return _Stream(call(path, mode, *arguments, **named), faults, path)

    return run


def _saving(call: Callable[..., Any], faults: Faults) -> Callable[..., Any]:
    def run(tensors: Any, path: Any, **named: Any) -> None:
        if faults.strikes("save", path):
            raise SafetensorError(f"Error while serializing: I/O error (os error {faults.number})")
        call(tensors, path, **named)

    return run
