"""One process at a time: a lock on a file, which the kernel releases when its holder ends, however it ends.

The file stays; what counts is the lock (flock), so nothing a dead process left can be in anyone's way. The holder's
process number is in the file, for the message.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from entrenar.errors import MachineError
from entrenar.files import explained_disk_errors

# A look (`is_held`) takes a share of the lock for a moment: who wants the whole asks again.
_LOOKS, _LOOK_S = 5, 0.01


@contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold the lock `path` inside the block; `what` it protects is named when another process holds it.

    Raises: MachineError when it is taken, or the file cannot be written.
    """
    with explained_disk_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _take(descriptor, path, what)
        with suppress(OSError):  # a message without the number is still one
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Return whether a process holds the lock. A look needs no right to write; where none is possible, nobody does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def check_free(path: Path, what: str) -> None:
    """Refuse what another process holds.

    Raises: MachineError.
    """
    if is_held(path):
        raise _in_use(path, what)


def _take(descriptor: int, path: Path, what: str) -> None:
    for _ in range(_LOOKS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOOK_S)
        except OSError:
            return  # a file system without locks: nobody can be refused there
        else:
            return
    raise _in_use(path, what)


def _in_use(path: Path, what: str) -> MachineError:
    holder = ""
    with suppress(OSError, ValueError):
        holder = f" {int(path.read_text(encoding='ascii'))}"
    return MachineError(f"{what} is in use by process{holder}: wait for its end or stop it, or choose another name")
