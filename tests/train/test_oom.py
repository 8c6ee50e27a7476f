"""Every way in which memory runs out is recognized, and nothing else is."""

import numpy as np
import pytest
import torch

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
    ],
)
def test_known_sentences_are_recognized(error: BaseException) -> None:
    """C++ containers, threads and devices report in their own words."""
    assert is_oom(error)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes"), ValueError("out of memory"), OSError(12, "x")])
def test_other_errors_are_not(error: BaseException) -> None:
    """Other RuntimeErrors, and other types with the same words, are not a lack of memory."""
    assert not is_oom(error)
