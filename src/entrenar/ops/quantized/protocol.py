"""The interface that every quantized weight has: the rest of the program knows no kind of them by name.

A kind (NF4, int8, a number of bits) is one file here: a frozen dataclass of tensors and a shape, with the arithmetic
that reads them. Products, embeddings, adapters, the planner and the proofs go through this protocol. A new kind that a
config or a file can name also gets a line in `kinds`, and a layout in `interop` if it is to be saved.

A kind with a faster product than "widen a tile, multiply it" hooks into `linear.frozen_output` and
`linear.frozen_input_gradient`, the only two products that a frozen weight has.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

# Makes a tensor of a shape and dtype whose contents do not matter.
MakeEmpty = Callable[[tuple[int, ...], torch.dtype], Tensor]


@runtime_checkable
class QuantizedWeight(Protocol):
    """A frozen weight (O, I) held in few bits.

    The constructor takes the tensors, in the order of `tensors`, and the shape.

    Attributes:
        kind: the name of the kind, which configs and files use.
    """

    kind: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the weight that it stands for."""

    @property
    def bits(self) -> int:
        """The width of a code, its share of the scales not counted."""

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""

    def tensors(self) -> Mapping[str, Tensor | None]:
        """Return everything that is stored, by name; None for a part that this weight does without."""

    def dequantize(
        self, dtype: torch.dtype = torch.float32, rows: slice | Tensor | None = None
    ) -> Float[Tensor, "rows I"]:
        """Return a range of rows, or those that a list of numbers names, computed in float32 and rounded once."""

    @classmethod
    def empty(cls, shape: tuple[int, int], make: MakeEmpty, bits: int) -> Self:
        """Return a weight of this shape with tensors from `make`; `bits` is for kinds of several widths."""


def stored_bytes(weight: QuantizedWeight) -> int:
    """Return the bytes of all its tensors."""
    return sum(tensor.nbytes for tensor in weight.tensors().values() if tensor is not None)
