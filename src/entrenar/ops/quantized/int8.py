"""Weights in eight bits with a scale for each row, for the embedding and the head.

A row of either stands for one token, and tokens differ in size; within a row 255 evenly spaced levels lose less than
bfloat16 keeps beyond four bits. Codes and scales are those of bitsandbytes' `int8_vectorwise_quant` (Dettmers et al.
2022, arXiv:2208.07339, section 2.1):

    quantize:    m_o = max |w| over row o,   code = round(127 w / m_o)                 (1)
    dequantize:  w = code · m_o / 127                                                  (2)
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor

from entrenar.errors import DataError
from entrenar.ops.quantized.protocol import MakeEmpty
from entrenar.ops.row_blocks import row_blocks

_LARGEST_CODE = 127
# Below this its reciprocal is infinite.
_SMALLEST_MAGNITUDE = 1e-36


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """A frozen weight (O, I) in eight bits.

    Attributes:
        codes: whole numbers from -127 to 127.
        absmax: each row's largest magnitude.
        shape: (O, I).
    """

    codes: Int8[Tensor, "O I"]
    absmax: Float32[Tensor, " O"]
    shape: tuple[int, int]

    kind: ClassVar[str] = "int8"

    @property
    def bits(self) -> int:
        """The width of a code."""
        return 8

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.codes.device

    def tensors(self) -> dict[str, Tensor | None]:
        """Return codes and scales by name."""
        return {"codes": self.codes, "absmax": self.absmax}

    def dequantize(
        self, dtype: torch.dtype = torch.float32, rows: slice | Tensor | None = None
    ) -> Float[Tensor, "rows I"]:
        """Return some rows of the weight, rounded once to `dtype`."""
        return dequantize_int8(self, dtype, rows)

    @classmethod
    def empty(cls, shape: tuple[int, int], make: MakeEmpty, bits: int = 8) -> Self:  # noqa: ARG003  # the protocol's
        """Return a weight of this shape with tensors from `make`."""
        return cls(make(shape, torch.int8), make((shape[0],), torch.float32), shape)


def quantize_int8(weight: Float[Tensor, "O I"]) -> Int8Weight:
    """Quantize a weight; temporaries stay at a few megabytes whatever its size.

    Raises:
        DataError: a number is NaN or infinite.
    """
    weight = weight.detach()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    absmax = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for rows in row_blocks(weight):
        part = weight[rows].float()
        absmax[rows] = part.abs().amax(1)
        scale = _LARGEST_CODE / absmax[rows].clamp_min(_SMALLEST_MAGNITUDE)
        codes[rows] = (part * scale[:, None]).round_().to(torch.int8)
    if not bool(absmax.isfinite().all()):
        row = int(absmax.isfinite().logical_not().nonzero()[0])
        raise DataError(
            f"a weight to quantize must be finite, got NaN or infinity in row {row} of {tuple(weight.shape)}; "
            "repair the weights first"
        )
    return Int8Weight(codes, absmax, (weight.shape[0], weight.shape[1]))


def dequantize_int8(
    weight: Int8Weight, dtype: torch.dtype = torch.float32, rows: slice | Tensor | None = None
) -> Float[Tensor, "rows I"]:
    """Return some rows of the weight, a range of them or those that a list names, rounded once to `dtype`."""
    rows = slice(None) if rows is None else rows
    return (weight.codes[rows] * (weight.absmax[rows] / _LARGEST_CODE)[:, None]).to(dtype)  # (2)
