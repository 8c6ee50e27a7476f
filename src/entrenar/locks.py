"""One process at a time: a lock on a file, which the kernel releases when its holder ends, however it ends.

The file stays; what counts is the lock (flock), so nothing a dead process left can be in anyone's way. The holder's
process number is in the file, for the message.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from entrenar.errors import MachineError
from entrenar.files import explained_disk_errors


@contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold the lock `path` inside the block; `what` it protects is named when another process holds it.

    Raises: MachineError when it is taken, or the file cannot be written.
    """
    descriptor = _open(path)
    try:
        _take(descriptor, what)
        with suppress(OSError):  # a message without the number is still one
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def check_free(path: Path, what: str) -> None:
    """Refuse what another process holds.

    Raises: MachineError.
    """
    if path.exists():
        descriptor = _open(path)
        try:
            _take(descriptor, what)
        finally:
            os.close(descriptor)


def _open(path: Path) -> int:
    with explained_disk_errors(path):
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _take(descriptor: int, what: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = ""
        with suppress(OSError, ValueError):
            holder = f" {int(os.pread(descriptor, 32, 0))}"
        raise MachineError(
            f"{what} is in use by process{holder}: wait for its end or stop it, or choose another name"
        ) from error
    except OSError:
        return  # a file system without locks: nobody can be refused there
