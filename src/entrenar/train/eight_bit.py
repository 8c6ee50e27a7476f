"""Optimizer state in eight bits: a code and a scale instead of a float32, a quarter of the memory.

Numbers are cut into blocks, each is divided by the block's largest magnitude, and the quotient becomes the nearest of
256 numbers that are dense near zero (Dettmers et al. 2022, arXiv:2110.02861). An outlier spoils one block only. The 256
numbers are bitsandbytes' own: a sign if there is one, a decimal exponent of variable length, and a linear fraction in
the remaining bits.

The nearest of 256 is found by one look-up: the quotient, rounded to bfloat16, has 65,536 values, and a table holds the
code of each. A search by halves takes forty times as long on a CPU.

One thing differs from bitsandbytes: a nonzero mean square never becomes zero. The mean is divided by its square root,
and a small mean is not nothing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256
_EXPONENTS = 7
_ALL_BITS = 0xFFFF


def dynamic_map(*, is_signed: bool) -> Tensor:
    """Return the 256 numbers that the codes stand for, ascending up to 1."""
    numbers = [torch.tensor([0.0, 1.0])]
    for exponent in range(_EXPONENTS):
        bounds = torch.linspace(0.1, 1, (1 << exponent) + 1 if is_signed else (2 << exponent) + 1)
        magnitudes = 10.0 ** (exponent - _EXPONENTS + 1) * ((bounds[:-1] + bounds[1:]) / 2)
        numbers += [magnitudes, -magnitudes] if is_signed else [magnitudes]
    return torch.cat(numbers).sort().values


def nearest_codes(numbers: Tensor, *, keeps_zero_apart: bool) -> Tensor:
    """Return the code of every bfloat16, indexed by its bits; `keeps_zero_apart` gives zero's code to zero alone."""
    patterns = torch.arange(_ALL_BITS + 1, dtype=torch.int32)
    values = patterns.to(torch.int16).view(torch.bfloat16).float().nan_to_num()
    codes = torch.bucketize(values, (numbers[1:] + numbers[:-1]) / 2)
    if keeps_zero_apart:
        codes[values > 0] = codes[values > 0].clamp(min=int((numbers == 0).nonzero()) + 1)
    return codes.to(torch.uint8)


@dataclass(frozen=True)
class EightBitCoder:
    """Turns pieces of one kind of state into codes and back, in its own working memory.

    Attributes:
        numbers: the values of the codes.
        codes_of: the code of each bfloat16.
        values: holds a piece as float32 between `decode` and `encode`.
    """

    numbers: Tensor
    codes_of: Tensor
    values: Tensor
    magnitudes: Tensor
    rounded: Tensor
    indices: Tensor

    @staticmethod
    def prepare(size: int, device: torch.device, *, is_signed: bool) -> "EightBitCoder":
        """Return a coder for pieces of at most `size` numbers, a multiple of `BLOCK`."""
        numbers = dynamic_map(is_signed=is_signed)
        return EightBitCoder(
            numbers=numbers.to(device),
            codes_of=nearest_codes(numbers, keeps_zero_apart=not is_signed).to(device),
            values=torch.zeros(size, device=device),
            magnitudes=torch.empty(size, device=device),
            rounded=torch.empty(size, dtype=torch.bfloat16, device=device),
            indices=torch.empty(size, dtype=torch.int32, device=device),
        )

    def decode(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Return the numbers of a piece, in `values`; allocates nothing."""
        indices, values = self.indices[: codes.numel()].copy_(codes), self.values[: codes.numel()]
        torch.index_select(self.numbers, 0, indices, out=values)
        self._blocks(self.values, scales).mul_(scales[:, None])
        return values

    def encode(self, codes: Tensor, scales: Tensor) -> None:
        """Write `values` as codes and scales; they are consumed. Allocates nothing."""
        size = codes.numel()
        self.values[size : scales.numel() * BLOCK].zero_()
        blocks = self._blocks(self.values, scales)
        torch.amax(torch.abs(blocks, out=self._blocks(self.magnitudes, scales)), dim=1, out=scales)
        scales.clamp_(min=torch.finfo(torch.float32).tiny)
        blocks.div_(scales[:, None])
        rounded = self.rounded[:size].copy_(self.values[:size])
        indices = self.indices[:size].copy_(rounded.view(torch.int16)).bitwise_and_(_ALL_BITS)
        torch.index_select(self.codes_of, 0, indices, out=codes)

    @staticmethod
    def _blocks(values: Tensor, scales: Tensor) -> Tensor:
        return values[: scales.numel() * BLOCK].view(-1, BLOCK)


def empty_codes(parameter: Tensor, *, is_signed: bool) -> tuple[Tensor, Tensor]:
    """Return the codes and scales of zeros, one code for each element of `parameter`."""
    zero = int((dynamic_map(is_signed=is_signed) == 0).nonzero())
    codes = torch.full_like(parameter, zero, dtype=torch.uint8, requires_grad=False)
    return codes, torch.zeros(-(-parameter.numel() // BLOCK), device=parameter.device)
