"""Frozen layers that come from a file when they are used and go afterwards: a base need not fit into memory.

A model folder is mapped into memory, so a layer's pages are the page cache's and cost nothing to give back: the kernel
has them in the file. Left alone, it gives back the page that was used longest ago, which in a loop over the layers is
the one that is needed next. So each layer says itself when it is done (MADV_DONTNEED), and asks for its successor
before it begins (MADV_WILLNEED); in the backward pass the successor is the layer below. See madvise(2).

Only pages of a file, and of weights that are not trained, are ever given back: those in memory alone would be lost.
"""

import ctypes
import mmap
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from entrenar.errors import ConfigError

_MAPS = Path("/proc/self/maps")


def give_back(tensor: Tensor) -> None:
    """Let the pages of a tensor that is mapped from a file go; they come back when they are read.

    The tensor must be mapped and never have been written to: the changes would be lost.
    """
    _advise(tensor.data_ptr(), tensor.nbytes, mmap.MADV_DONTNEED)


def _advise(address: int, size: int, advice: int) -> None:
    # Whole pages only: those at the ends are shared with a neighbor, which may be trained.
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < stop:
        # Advice may be refused, by a kernel without it or for pages that are locked; nothing depends on it.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), advice)


@runtime_checkable
class Stream(Protocol):
    """Told by the model which layer it uses; `LayerStream` is one, and a plan has one without bytes."""

    size_bytes: int

    def begin(self, layer: int) -> None:
        """Prepare for the forward of a layer."""
        ...

    def end(self, layer: int, out: Tensor) -> None:
        """Release a layer after its forward; `out` is its output."""
        ...


class LayerStream:
    """Brings the frozen weights of the layers before they are used and lets them go after.

    Attributes:
        size_bytes: what of the layers is mapped from files.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        files = list(_mapped_files())
        self._tensors = [[t for t in _frozen(layer) if _is_within(t, files)] for layer in layers]
        self.size_bytes = sum(tensor.nbytes for tensors in self._tensors for tensor in tensors)
        if not self.size_bytes:
            raise ConfigError(
                "stream_base needs frozen layers that are mapped from a file as they are computed with: train adapters "
                "over a bfloat16 folder with precision = bfloat16, or over an NF4 folder, or leave stream_base out"
            )
        for layer in range(len(layers)):
            self._let_go(layer)

    def begin(self, layer: int) -> None:
        """Ask for the layer after this one."""
        self._ask_for(layer + 1)

    def end(self, layer: int, out: Tensor) -> None:
        """Let this layer go; when the gradient of its output is there, ask for it again and let the one above go."""
        self._let_go(layer)
        if out.requires_grad:
            out.register_hook(lambda _: self._begin_backward(layer))  # type: ignore[no-untyped-call]

    def _begin_backward(self, layer: int) -> None:
        self._let_go(layer + 1)
        self._ask_for(layer - 1)

    def _ask_for(self, layer: int) -> None:
        if 0 <= layer < len(self._tensors):
            for tensor in self._tensors[layer]:
                _advise(tensor.data_ptr(), tensor.nbytes, mmap.MADV_WILLNEED)

    def _let_go(self, layer: int) -> None:
        if layer < len(self._tensors):
            for tensor in self._tensors[layer]:
                give_back(tensor)


def _frozen(layer: nn.Module) -> Iterator[Tensor]:
    return (tensor for tensor in chain(layer.parameters(), layer.buffers()) if not tensor.requires_grad)


def _mapped_files() -> Iterator[tuple[int, int]]:
    """Yield first and last address of each mapping of a file of weights."""
    for line in _MAPS.read_text(encoding="utf-8", errors="replace").splitlines() if _MAPS.is_file() else ():
        if line.endswith(".safetensors"):
            first, last = line.split()[0].split("-")
            yield int(first, 16), int(last, 16)


def _is_within(tensor: Tensor, files: Sequence[tuple[int, int]]) -> bool:
    first = tensor.data_ptr()
    return tensor.device.type == "cpu" and any(
        start <= first and first + tensor.nbytes <= stop for start, stop in files
    )
