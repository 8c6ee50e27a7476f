"""Run each matrix product once for real, for what libraries keep afterwards: packed operands, generated code.

MKL copies operands into buffers whose size follows from the product, and never frees them: 35 MB for 262 x 768 x
32,000 on two threads, more than all activations of a small model. So a rehearsal runs each product once, when it first
meets it, and the buffers take the place in the heap that they take in the run. The operands are pages of zeros, which
cost no memory to read; the result is freed at once.
"""

import mmap
from typing import Any

import torch
from torch import Tensor

# Of a larger product a part is run, with its longest side halved: buffers hold blocks and do not grow with the rows.
_MOST_FLOPS = 1e11
_FIRST_OPERAND = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::addmm_": 1}


class ProductWarmup:
    """Runs each product of a new shape, layout or dtype once."""

    def __init__(self) -> None:
        self._done: set[tuple[Any, ...]] = set()

    def run(self, name: str, tensors: list[Tensor]) -> None:
        """Run the operation `name` on operands like `tensors`, if it is a product that has not run before."""
        first = _FIRST_OPERAND.get(name)
        if first is None:
            return
        a, b = tensors[first : first + 2]
        m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
        layout = a.stride(-1) == 1, b.stride(-1) == 1
        key = (m, k, n, a.dtype, *layout)
        if key in self._done or 0 in (m, k, n):
            return
        self._done.add(key)
        m, k, n = _shortened(m, k, n)
        torch.mm(
            _zeros(m, k, a.dtype, by_rows=layout[0]),
            _zeros(k, n, a.dtype, by_rows=layout[1]),
            out=_zeros(m, n, a.dtype, by_rows=True),
        )


def _shortened(m: int, k: int, n: int) -> tuple[int, int, int]:
    sides = [m, k, n]
    while 2 * sides[0] * sides[1] * sides[2] > _MOST_FLOPS:
        longest = sides.index(max(sides))
        sides[longest] = -(-sides[longest] // 2)
    return sides[0], sides[1], sides[2]


def _zeros(rows: int, columns: int, dtype: torch.dtype, *, by_rows: bool) -> Tensor:
    """Return zeros in pages outside the heap that take no memory until they are written to."""
    pages = mmap.mmap(-1, rows * columns * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    flat = torch.frombuffer(pages, dtype=dtype)
    return flat.view(rows, columns) if by_rows else flat.view(columns, rows).mT
