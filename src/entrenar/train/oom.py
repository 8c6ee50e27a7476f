"""Recognize that memory ran out, on a device or on the host, in each of the forms it takes.

On a CPU torch never raises `torch.OutOfMemoryError`: its allocator raises a RuntimeError with a sentence, C++
containers raise `std::bad_alloc` through one, oneDNN says "could not create", numpy and Python raise MemoryError, a
file that cannot be mapped is a RuntimeError, an OSError or an error of safetensors. All are recoverable as long as the
step is undone, so only forward and backward are retried (`step.py`), never the optimizer.
"""

import ctypes
import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

from entrenar.errors import OutOfMemoryError

_SENTENCES = (
    "can't allocate memory",
    "cannot allocate memory",
    "os error 12)",
    "std::bad_alloc",
    "not enough memory",
    "out of memory",
    "can't start new thread",
    "could not create a primitive",
    "could not create a memory object",
)


def is_oom(error: BaseException) -> bool:
    """Return whether `error` means that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError | SafetensorError) and any(
        sentence in str(error).lower() for sentence in _SENTENCES
    )


@contextmanager
def explained_oom(activity: str) -> Iterator[None]:
    """Turn running out of memory in the block into our error; `activity` names the work and what would help.

    Raises: OutOfMemoryError.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError, SafetensorError) as error:
        if not is_oom(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise OutOfMemoryError(f"memory ran out while {activity} ({reason})") from error


def return_freed_memory() -> None:
    """Give freed memory back to the device and the kernel, so that more than torch's allocator can use it.

    glibc keeps what a failed step freed. oneDNN maps its generated code straight from the kernel and would find nothing
    left, however small the pieces of the next try.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
