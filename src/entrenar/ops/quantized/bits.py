"""Frozen weights in 2 to 8 bits, for a base that must meet a budget of bits.

NF4's idea (`nf4`) at any width, with three changes that cost no bit; docs/log.md has the figures. A block of 64 numbers
of a row has a scale of either sign, so that its largest number is exactly +1 and no level is spent on -1 (Blumenberg et
al. 2025, arXiv:2505.06653). Levels are as dense as the cube root of the numbers' density, which gives the least squared
error (Panter & Dite 1951, eq. 16), where quantiles give each level as many numbers and leave the tails coarse. And the
scale is the best of a few, not the largest number alone.

    levels:      F⁻¹((i + ½) / (2ᵏ - 1)), i = 0 … 2ᵏ-2, and 1                         (1)
    scale:       d = argmin over c in choices of Σ_j h_j (w_j - round(w_j; c m))²      (2)
    dequantize:  d = scale code · top / 127,   w = level[code] · d                     (3)

with F a normal distribution of deviation √3 · 0.34 cut to [-1, 1] (the cube root of a normal density is one of √3 times
the deviation), m the number of largest magnitude in the block, and a `top`, in float32, for 256 rows of a block's
column. The level in the middle is an exact zero. Together k + 0.127 bits.

With the second moments H of the inputs, h is how much a column's rounding costs once all columns after it make up for
it, and they do: each column's error is spread over those that are not yet rounded, so that what is least is the error
of the product and not of the weight (Frantar et al. 2022, arXiv:2210.17323, algorithm 1). Without them h is 1.

Codes lie as planes of bits, row by row: byte n of plane j holds bit j of the codes 8n to 8n + 7. So every width is
whole bytes, and eight codes are found by a look-up for each plane.
"""

import functools
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar, Self

import torch
from jaxtyping import Float, Float32, Int8, UInt8
from torch import Tensor
from torch.nn.functional import pad

from entrenar.errors import ConfigError, DataError
from entrenar.ops.quantized.protocol import MakeEmpty, stored_bytes

BLOCK, GROUP = 64, 256
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
_DEVIATION = 0.34 * 3**0.5
_CHOICES = (1.0, 0.93, 0.86, 0.79, 0.7, 1.1, -1.0, -0.9, -0.8)
# From this width on the largest number is as good a scale as any.
_FINE_WIDTH = 6
_LARGEST_CODE = 127
# Of the mean second moment, added to all: without it inputs that never occur have no inverse.
_DAMPING = 0.01
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class NfBitsWeight:
    """A frozen weight (O, I) in k bits.

    Attributes:
        codes: planes of bits.
        scales: a scale's code for each block of a row.
        tops: the largest scale of 256 rows, for each block of a row.
        shape: (O, I).
    """

    codes: UInt8[Tensor, "O bits bytes"]
    scales: Int8[Tensor, "O blocks"]
    tops: Float32[Tensor, "groups blocks"]
    shape: tuple[int, int]

    kind: ClassVar[str] = "nf-bits"

    @property
    def bits(self) -> int:
        """The width of a code."""
        return self.codes.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.codes.device

    def tensors(self) -> dict[str, Tensor | None]:
        """Return codes, scales and tops by name."""
        return {"codes": self.codes, "scales": self.scales, "tops": self.tops}

    def dequantize(
        self, dtype: torch.dtype = torch.float32, rows: slice | Tensor | None = None
    ) -> Float[Tensor, "rows I"]:
        """Return some rows of the weight, rounded once to `dtype`."""
        return dequantize_nf_bits(self, dtype, rows)

    @classmethod
    def empty(cls, shape: tuple[int, int], make: MakeEmpty, bits: int) -> Self:
        """Return a weight of this shape and width with tensors from `make`."""
        rows, blocks = shape[0], -(-shape[1] // BLOCK)
        codes, scales = make((rows, bits, -(-shape[1] // 8)), torch.uint8), make((rows, blocks), torch.int8)
        return cls(codes, scales, make((-(-rows // GROUP), blocks), torch.float32), shape)


def nf_bits_size(shape: tuple[int, int], bits: int) -> int:
    """Return the bytes of a weight of this shape at a width."""
    return stored_bytes(
        NfBitsWeight.empty(shape, lambda sizes, dtype: torch.empty(sizes, dtype=dtype, device="meta"), bits)
    )


def nf_bits_levels(bits: int, device: torch.device | None = None) -> Float32[Tensor, " levels"]:
    """Return the 2ᵏ levels of equation (1), ascending."""
    return torch.tensor(_levels(bits), dtype=torch.float32, device=device)


@functools.cache
def _levels(bits: int) -> tuple[float, ...]:
    normal, count = NormalDist(0.0, _DEVIATION), 2**bits - 1
    low = normal.cdf(-1.0)
    positive = [normal.inv_cdf(low + (1 - 2 * low) * (i + 0.5) / count) for i in range(count // 2 + 1, count)]
    return *(-level for level in reversed(positive)), 0.0, *positive, 1.0


def quantize_nf_bits(
    weight: Float[Tensor, "O I"], bits: int, moments: Float[Tensor, "I I"] | None = None, *, is_draft: bool = False
) -> NfBitsWeight:
    """Quantize a weight, with the second moments Σ xᵀx of its inputs if they are known.

    A draft takes the largest number for the scale, which is several times faster and a tenth or so worse.

    Raises:
        ConfigError: no such width.
        DataError: a number of the weight or of the moments is NaN or infinite.
    """
    if bits not in WIDTHS:
        raise ConfigError(f"a weight can be given {WIDTHS[0]} to {WIDTHS[-1]} bits, got {bits}")
    if not bool(weight.isfinite().all()):
        row = int(weight.isfinite().all(1).logical_not().nonzero()[0])
        raise DataError(f"a weight to quantize must be finite, got NaN or infinity in row {row}; repair it first")
    spread = None if moments is None else _spread_of(moments)
    choices = _CHOICES[:1] if is_draft or bits >= _FINE_WIDTH else _CHOICES
    parts = [_quantize_rows(rows, bits, spread, choices) for rows in torch.split(weight.detach(), _ROWS_AT_ONCE)]
    codes, scales, tops = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return NfBitsWeight(codes, scales, tops, (weight.shape[0], weight.shape[1]))


def _spread_of(moments: Tensor) -> Float32[Tensor, "I I"]:
    """Return U, upper triangular, with Uᵀ U the inverse of the damped moments."""
    if not bool(moments.isfinite().all()):
        raise DataError("the second moments of inputs must be finite, got NaN or infinity; calibrate in float32")
    damped = moments.float().clone()
    damped.diagonal().add_(_DAMPING * damped.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped / damped.diagonal().mean()))
    spread: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return spread


def _quantize_rows(
    weight: Tensor, bits: int, spread: Tensor | None, choices: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales and tops of some rows, one column of blocks after the other."""
    rest = weight.float().clone()  # not yet rounded, including the errors of rounded columns
    levels = nf_bits_levels(bits, weight.device)
    importance = None if spread is None else spread.diagonal() ** -2
    codes, scales, tops = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device), [], []
    for start in range(0, weight.shape[1], BLOCK):
        columns = slice(start, min(start + BLOCK, weight.shape[1]))
        block = rest[:, columns]
        wanted = _best_scales(block, levels, None if importance is None else importance[columns], choices)
        scale_codes, top, numbers = _round_scales(wanted)
        scales.append(scale_codes)
        tops.append(top)
        if spread is None:
            codes[:, columns] = _nearest(block / numbers, levels)
        else:
            codes[:, columns], errors = _round_and_spread(block, numbers, levels, spread[columns, columns])
            rest[:, columns.stop :].addmm_(errors, spread[columns, columns.stop :], alpha=-1)
    return _planes(codes, bits), torch.cat(scales, dim=1), torch.stack(tops, dim=1)


def _nearest(scaled: Tensor, levels: Tensor) -> Tensor:
    return torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2, out_int32=True)


def _best_scales(
    block: Tensor, levels: Tensor, importance: Tensor | None, choices: tuple[float, ...]
) -> Float32[Tensor, "O 1"]:
    """Return d of equation (2)."""
    largest = block.gather(1, block.abs().argmax(1, keepdim=True))
    if len(choices) == 1:
        return largest  # the first choice is 1
    best, least = largest, torch.full_like(largest, torch.inf)
    for choice in choices:
        scale = largest * choice
        squares = (levels[_nearest(block / scale, levels)] * scale - block).square_()
        error = (squares if importance is None else squares * importance).sum(1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _round_scales(wanted: Float32[Tensor, "O 1"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the codes (O, 1), the tops of 256 rows, and the numbers (O, 1) that they stand for."""
    grouped = pad(wanted[:, 0], (0, -len(wanted) % GROUP)).view(-1, GROUP)
    tops = grouped.abs().amax(1)
    tops = torch.where(tops == 0, torch.ones_like(tops), tops)  # of nothing but zeros
    codes = (grouped / tops[:, None] * _LARGEST_CODE).round()
    codes = torch.where(codes == 0, torch.ones_like(codes), codes)  # a scale of 0 could not be divided by
    numbers = codes * (tops / _LARGEST_CODE)[:, None]
    return codes.view(-1, 1)[: len(wanted)].to(torch.int8), tops, numbers.view(-1, 1)[: len(wanted)]


def _round_and_spread(
    block: Tensor, scale: Tensor, levels: Tensor, spread: Float32[Tensor, "b b"]
) -> tuple[Tensor, Tensor]:
    """Round columns in turn, each error moved to those after it; return codes, and errors over U's diagonal."""
    by_column = block.mT.contiguous()  # (b, O)
    codes, errors = torch.empty_like(by_column, dtype=torch.uint8), torch.empty_like(by_column)
    thresholds, scale = (levels[:-1] + levels[1:]) / 2, scale[:, 0]
    for column in range(len(by_column)):
        code = torch.bucketize(by_column[column] / scale, thresholds, out_int32=True)
        codes[column] = code
        errors[column] = (by_column[column] - levels[code] * scale) / spread[column, column]
        by_column[column + 1 :].addr_(spread[column, column + 1 :], errors[column], alpha=-1)
    return codes.mT, errors.mT


def _planes(codes: UInt8[Tensor, "O I"], bits: int) -> UInt8[Tensor, "O bits bytes"]:
    groups = pad(codes, (0, -codes.shape[1] % 8)).view(len(codes), -1, 8)
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    planes = [((groups >> plane & 1) << places).sum(2, dtype=torch.uint8) for plane in range(bits)]
    return torch.stack(planes, dim=1)


def dequantize_nf_bits(
    weight: NfBitsWeight, dtype: torch.dtype = torch.float32, rows: slice | Tensor | None = None
) -> Float[Tensor, "rows I"]:
    """Return some rows of the weight, a range of them or those that a list names, rounded once to `dtype`."""
    rows = slice(None) if rows is None else rows
    numbers = torch.arange(weight.shape[0], device=weight.device)[rows]
    scales = weight.scales[rows] * (weight.tops[numbers // GROUP] / _LARGEST_CODE)  # (3)
    levels = _look_up(weight.codes[rows], weight.bits)
    if weight.shape[1] % BLOCK:
        levels *= scales.repeat_interleave(BLOCK, dim=1)[:, : levels.shape[1]]
    else:
        levels.view(len(scales), -1, BLOCK).mul_(scales[..., None])
    return levels[:, : weight.shape[1]].to(dtype)


def _look_up(codes: UInt8[Tensor, "rows bits bytes"], bits: int) -> Float32[Tensor, "rows numbers"]:
    """Return the levels: planes to one to four codes a byte, and those to as many levels at once."""
    together = 8 // bits
    spread, levels = _tables(bits, codes.device)
    words = torch.index_select(spread, 0, codes.reshape(-1).int()).view(codes.shape)  # bit 0 of eight codes each
    joined = words[:, 0].contiguous()
    for plane in range(1, bits):
        joined |= words[:, plane] << plane
    indices = joined.view(torch.uint8).reshape(-1)
    wide = {1: torch.float32, 2: torch.int64, 4: torch.complex128}[together]
    found = torch.index_select(levels.view(wide).view(-1), 0, indices.int())
    return found.view(torch.float32).view(len(codes), -1)


def _tables(bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return what a byte of a plane is as a word of codes, and the levels that a byte of codes stands for."""
    together = 8 // bits
    byte, place = torch.arange(256, device=device)[:, None], torch.arange(8, device=device)
    bit = (byte >> place & 1) << place % together * bits  # (256, 8)
    by_index = bit.view(256, 8 // together, together).sum(2).to(torch.uint8).contiguous()
    word = {1: torch.int64, 2: torch.int32, 4: torch.int16}[together]
    index = torch.arange(2 ** (bits * together), device=device)[:, None]
    codes = index >> torch.arange(together, device=device) * bits & 2**bits - 1
    return by_index.view(word).view(-1), nf_bits_levels(bits, device)[codes].contiguous()
