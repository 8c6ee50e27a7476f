"""Recognize that memory ran out, on a device or on the host, whatever shape the news takes.

On a CPU torch never raises `torch.OutOfMemoryError`: its allocator raises a RuntimeError with a sentence, C++
containers raise `std::bad_alloc` through one, numpy and Python raise MemoryError. All are recoverable as long as
the step is undone, which is why only forward and backward are retried (`step.py`), never the optimizer.
"""

import torch

_SENTENCES = ("can't allocate memory", "std::bad_alloc", "not enough memory", "out of memory", "can't start new thread")


def is_oom(error: BaseException) -> bool:
    """Say whether `error` means that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sentence in str(error).lower() for sentence in _SENTENCES)
