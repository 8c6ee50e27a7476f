"""Every way in which memory runs out is recognized, and nothing else is."""

import errno

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from entrenar.train import is_oom


def _real(action: str) -> BaseException:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(1 << 48) if action == "torch" else np.empty(1 << 48) if action == "numpy" else bytearray(1 << 60)
    return caught.value


@pytest.mark.parametrize("library", ["torch", "numpy", "python"])
def test_real_failures_are_recognized(library: str) -> None:
    """An impossible request to torch, numpy and Python is a lack of memory."""
    assert is_oom(_real(library))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("can't start new thread"),
        RuntimeError("could not create a primitive"),
        RuntimeError("unable to mmap 6124932 bytes from file <x>: Cannot allocate memory (12)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        SafetensorError("Error while deserializing header: I/O error: Cannot allocate memory (os error 12)"),
    ],
)
def test_known_sentences_are_recognized(error: BaseException) -> None:
    """C++ containers, threads, devices, files that are mapped and the kernel report in their own words."""
    assert is_oom(error)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes"), ValueError("out of memory"), OSError(5, "x")])
def test_other_errors_are_not(error: BaseException) -> None:
    """Other RuntimeErrors, and other types with the same words, are not a lack of memory."""
    assert not is_oom(error)
