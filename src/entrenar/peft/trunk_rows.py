"""Store the state of one token as bytes: exact, rounded to bfloat16, or in 8 bits with a scale for each block.

A LLaMA's state has a few channels that are a hundred times larger than the rest, so one scale for a whole row would
leave the rest with a bit or two; a scale for each 64 channels keeps the damage to the blocks that hold one.
Linear rounding to 8 bits moves an element by at most absmax/254, so a block of b by at most sqrt(b)/254 of its norm.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

RowKind = Literal["float32", "bfloat16", "int8"]

_BLOCK = 64
_SCALE_BYTES = 4


@dataclass(frozen=True)
class RowFormat:
    """A row of `width` numbers as bytes."""

    kind: RowKind
    width: int

    @property
    def block(self) -> int:
        """Channels that share a scale in int8."""
        shared = math.gcd(self.width, _BLOCK)
        return shared if shared >= 8 else self.width

    @property
    def size_bytes(self) -> int:
        """Bytes of one row."""
        if self.kind == "int8":
            return self.width + self.width // self.block * _SCALE_BYTES
        return self.width * self.dtype.itemsize

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is stored for each channel."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}[self.kind]

    @property
    def largest_error(self) -> float:
        """The most that a row moves, relative to its norm."""
        return {"float32": 2**-24, "bfloat16": 2**-8, "int8": math.sqrt(self.block) / 254}[self.kind]

    def encode(self, x: Float[Tensor, "N D"]) -> UInt8[Tensor, "N bytes"]:
        """Return the rows as bytes."""
        if self.kind != "int8":
            return x.to("cpu", self.dtype).contiguous().view(torch.uint8)
        blocks = x.to("cpu", torch.float32).reshape(len(x), -1, self.block)
        scales = blocks.abs().amax(-1, keepdim=True) / 127
        codes = (blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
        parts = (scales.reshape(len(x), -1).view(torch.uint8), codes.reshape(len(x), -1).view(torch.uint8))
        return torch.cat(parts, dim=1)

    def decode(self, rows: UInt8[Tensor, "N bytes"], dtype: torch.dtype) -> Float[Tensor, "N D"]:
        """Return bytes as numbers."""
        if self.kind != "int8":
            return rows.view(self.dtype).to(dtype)
        scale_bytes = self.size_bytes - self.width
        scales = rows[:, :scale_bytes].contiguous().view(torch.float32)
        codes = rows[:, scale_bytes:].contiguous().view(torch.int8).float().view(len(rows), -1, self.block)
        return (codes * scales[..., None]).reshape(len(rows), self.width).to(dtype)
