"""Weights in four bits: NormalFloat4 with doubly quantized scales (Dettmers et al. 2023, arXiv:2305.14314, section 3).

A trained weight is nearly normal within a small block, so 16 levels at the quantiles of a normal distribution (eq. 4)
waste no code. A weight (O, I) is cut, row after row, into blocks of 64; a block stores its largest magnitude and a
level for each number. Those magnitudes, one in 64, are themselves quantized: less their mean, in blocks of 256, to 8
bits of a dynamic map (Dettmers 2015, arXiv:1511.04561), whose levels lie densely around zero. Together 4.127 bits.

    quantize:    m_b = max |w| over block b,   code = nearest level of w / m_b        (1)
                 offset = mean of m,   n_g = max |m_b - offset| over 256 blocks       (2)
                 scale code = nearest number of the map to (m_b - offset) / n_g       (3)
    dequantize:  m_b = map[scale code] · n_g + offset                                 (4)
                 w = level[code] · m_b                                                (5)

Every bit is bitsandbytes' own (its CPU kernels), so that a file of either is read by the other: the order of the
roundings in (1) and (5), the ties (a number halfway goes to the lower level), the mean as torch sums it, the last
block of a width that no block divides (it is shorter), the first of two codes in the high half of a byte. Equation (3)
is its look-up among 65,536 bins, which can miss the nearest number by one in the map's densest part.

Nothing here is differentiated: `quantized_linear` is the operation.
"""

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from entrenar.errors import DataError
from entrenar.ops.quantized.nf4_kernels import widening_on
from entrenar.ops.quantized.protocol import MakeEmpty

BLOCK, NESTED_BLOCK = 64, 256
_BINS = 65536
# What is quantized at a time: a multiple of every block whose float32 temporaries stay small beside a weight.
_CHUNK = 1 << 20
_STRETCH = 1 << 17
# Numbers looked up one by one at a time: their places take 8 bytes each.
_LOOKED_UP_AT_ONCE = 1 << 18
# Below this the reciprocal of a block's magnitude is infinite.
_SMALLEST_MAGNITUDE = 1e-38


@dataclass(frozen=True, eq=False)
class Nf4Weight:
    """A frozen weight (O, I) in four bits.

    Attributes:
        codes: two levels a byte, the first in the high half, row after row.
        absmax: each block's magnitude, as a code of the dynamic map; or as a number where it was quantized once.
        nested_absmax: the largest |magnitude - offset| of 256 blocks; None where `absmax` holds numbers.
        offset: the mean magnitude; None where `absmax` holds numbers.
        shape: (O, I).
    """

    codes: UInt8[Tensor, " bytes"]
    absmax: UInt8[Tensor, " blocks"] | Float[Tensor, " blocks"]
    nested_absmax: Float[Tensor, " nested"] | None
    offset: Float[Tensor, ""] | None
    shape: tuple[int, int]

    kind: ClassVar[str] = "nf4"

    @property
    def bits(self) -> int:
        """The width of a code."""
        return 4

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.codes.device

    def tensors(self) -> dict[str, Tensor | None]:
        """Return codes and scales by name."""
        held = {"codes": self.codes, "absmax": self.absmax}
        return {**held, "nested_absmax": self.nested_absmax, "offset": self.offset}

    def dequantize(
        self, dtype: torch.dtype = torch.float32, rows: slice | Tensor | None = None
    ) -> Float[Tensor, "rows I"]:
        """Return some rows of the weight, computed in float32 and rounded once to `dtype`."""
        return rows_of_nf4(self, rows, dtype) if isinstance(rows, Tensor) else dequantize_nf4(self, dtype, rows)

    @classmethod
    def empty(cls, shape: tuple[int, int], make: MakeEmpty, bits: int = 4) -> Self:  # noqa: ARG003  # the protocol's
        """Return a doubly quantized weight of this shape with tensors from `make`."""
        numbers, blocks = math.prod(shape), -(-math.prod(shape) // BLOCK)
        codes, absmax = make((-(-numbers // 2),), torch.uint8), make((blocks,), torch.uint8)
        # The offset is one number, computed and never read from a file: it is made here.
        offset = torch.zeros((), device=codes.device)
        return cls(codes, absmax, make((-(-blocks // NESTED_BLOCK),), torch.float32), offset, shape)


def nf4_code_book(device: torch.device | None = None) -> Float[Tensor, "16"]:
    """Return the 16 levels, ascending: quantiles of a normal distribution, scaled to [-1, 1], with an exact zero."""
    return torch.tensor(_levels(), device=device)


def _levels() -> npt.NDArray[np.float32]:
    levels = (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    )  # fmt: skip
    return np.array(levels, dtype=np.float32)


def dynamic_map(device: torch.device | None = None) -> Float[Tensor, "256"]:
    """Return the 256 numbers that a block's magnitude is rounded to, ascending.

    Seven decades, each with twice as many numbers as the one below, evenly spread; both signs; 0 and 1.
    """
    return torch.tensor(_map_numbers(), device=device)


@functools.cache
def _map_numbers() -> npt.NDArray[np.float32]:
    # Kept as numpy, because a tensor made under a fake-tensor mode would outlive it. Every edge is start + i · step or
    # end - i · step, rounded once, as torch.linspace makes them: the map of a file must be this one to the bit.
    numbers = [0.0, 1.0]
    start, stop = (np.float64(np.float32(end)) for end in (0.1, 1))
    for decade in range(7):
        count = 2**decade
        step = np.float64((np.float32(1) - np.float32(0.1)) / np.float32(count))
        i = np.arange(count + 1)
        edges = np.where(i < (count + 1) // 2, start + i * step, stop - (count - i) * step).astype(np.float32)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        factor = np.float32(10.0 ** (decade - 6))
        numbers += [*(factor * means), *(-factor * means)]
    return np.sort(np.array(numbers, dtype=np.float32))


def quantize_nf4(weight: Float[Tensor, "O I"]) -> Nf4Weight:
    """Quantize a weight twice; temporaries stay at a few megabytes whatever its size.

    Raises:
        DataError: a number is NaN or infinite.
    """
    flat = weight.detach().reshape(-1)
    codes = torch.empty(-(-flat.numel() // 2), dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(-(-flat.numel() // BLOCK), dtype=torch.float32, device=weight.device)
    book = nf4_code_book(weight.device)
    thresholds = (book[:-1] + book[1:]) / 2
    for start in range(0, flat.numel(), _CHUNK):
        part = flat[start : start + _CHUNK].float()
        magnitudes, levels = _quantize_blocks(part, thresholds)
        absmax[start // BLOCK :][: len(magnitudes)] = magnitudes
        codes[start // 2 :][: len(levels)] = levels
    if not bool(absmax.isfinite().all()):
        block = int(absmax.isfinite().logical_not().nonzero()[0])
        raise DataError(
            f"a weight to quantize must be finite, got NaN or infinity in row {block * BLOCK // weight.shape[1]} "
            f"of {tuple(weight.shape)}; repair the weights first"
        )
    if not absmax.numel():
        return Nf4Weight(codes, absmax, None, None, (weight.shape[0], weight.shape[1]))
    offset = absmax.mean()
    scale_codes, nested_absmax = _quantize_magnitudes(absmax - offset)
    return Nf4Weight(codes, scale_codes, nested_absmax, offset, (weight.shape[0], weight.shape[1]))


def _quantize_blocks(numbers: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Return magnitudes and packed codes of equation (1)."""
    full = numbers.numel() - numbers.numel() % BLOCK
    blocks = numbers[:full].view(-1, BLOCK)
    magnitudes = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / magnitudes.clamp_min(_SMALLEST_MAGNITUDE))[:, None]).view(-1)
    if full < numbers.numel():
        last = numbers[full:].abs().amax().clamp_min(_SMALLEST_MAGNITUDE)
        magnitudes = torch.cat((magnitudes, last[None]))
        scaled = torch.cat((scaled, numbers[full:] / last))
    if scaled.numel() % 2:
        scaled = torch.cat((scaled, scaled.new_zeros(1)))
    levels = torch.bucketize(scaled, thresholds, out_int32=True).to(torch.uint8)
    return magnitudes, levels[::2] << 4 | levels[1::2]


def _quantize_magnitudes(centered: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and magnitudes of equations (2) and (3)."""
    numbers = dynamic_map(centered.device)
    bins = torch.arange(_BINS, dtype=torch.float32, device=centered.device)
    code_of_bin = torch.bucketize(-1 + bins * 2 / (_BINS - 1), 0.5 * (numbers[:-1] + numbers[1:]))
    padded = torch.nn.functional.pad(centered, (0, -len(centered) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    magnitudes = padded.abs().amax(1)
    scaled = padded * (1.0 / magnitudes.clamp_min(_SMALLEST_MAGNITUDE))[:, None]
    # In float64 and rounded once, as the fused multiply-add of the kernel does.
    places = ((scaled + 1) * 0.5).double() * (_BINS - 1) + 0.5
    codes = code_of_bin[places.float().long()].to(torch.uint8)
    codes[magnitudes == 0] = 0
    return codes.view(-1)[: len(centered)].contiguous(), magnitudes


def dequantize_nf4(
    weight: Nf4Weight, dtype: torch.dtype = torch.float32, rows: slice | None = None
) -> Float[Tensor, "rows I"]:
    """Return some rows of the weight, computed in float32 and rounded once to `dtype`."""
    begin, end, _ = (rows or slice(None)).indices(weight.shape[0])
    width = weight.shape[1]
    first, last = begin * width, max(begin, end) * width
    first_block, last_block = first // BLOCK, -(-last // BLOCK)
    origin = first_block * BLOCK  # even, so a byte boundary
    pairs = weight.codes[origin // 2 : -(-last // 2)]
    magnitudes = block_magnitudes(weight, first_block, last_block)
    # While a compiler traces there is nothing to time, and ours has the same bits.
    is_traced = torch.compiler.is_compiling()
    numbers = (widen if is_traced else widening_on(weight.device, dtype, widen))(pairs, magnitudes, dtype)
    return numbers[first - origin : last - origin].view(-1, width)


def rows_of_nf4(
    weight: Nf4Weight, numbers: Int[Tensor, " rows"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "rows I"]:
    """Return the rows that a list names, some at a time.

    A row need not begin with a block nor with a byte, so each number is looked up by its place in the flat weight.
    """
    rows = torch.empty(len(numbers), weight.shape[1], dtype=dtype, device=weight.device)
    step = max(1, _LOOKED_UP_AT_ONCE // weight.shape[1])
    for start in range(0, len(numbers), step):
        rows[start : start + step] = _looked_up(weight, numbers[start : start + step])
    return rows


def _looked_up(weight: Nf4Weight, numbers: Tensor) -> Tensor:
    places = numbers[:, None] * weight.shape[1] + torch.arange(weight.shape[1], device=numbers.device)
    pairs = weight.codes[places >> 1].int()
    levels = nf4_code_book(weight.device)[torch.where(places % 2 == 0, pairs >> 4, pairs & 15)]
    blocks = places // BLOCK
    magnitudes = weight.absmax[blocks]
    if weight.nested_absmax is not None and weight.offset is not None:
        nested = weight.nested_absmax[blocks // NESTED_BLOCK]
        magnitudes = dynamic_map(weight.device)[magnitudes.int()] * nested + weight.offset  # (4)
    return levels * magnitudes  # (5)


def widen(pairs: UInt8[Tensor, " bytes"], magnitudes: Float[Tensor, " blocks"], dtype: torch.dtype) -> Tensor:
    """Return the two numbers of each byte, by equation (5) in float32, rounded once to `dtype`."""
    table = torch.tensor(_pair_numbers(), device=pairs.device)
    levels = torch.empty(2 * len(pairs), dtype=torch.float32, device=pairs.device)
    # A stretch at a time, so that indices and levels are still in cache for the multiplication.
    for start in range(0, len(levels), _STRETCH):
        stretch = levels[start : start + _STRETCH]
        codes = pairs[start // 2 : (start + _STRETCH) // 2].int()
        torch.index_select(table, 0, codes, out=stretch.view(torch.int64))
        scales = magnitudes[start // BLOCK : (start + _STRETCH) // BLOCK]
        full = len(stretch) // BLOCK
        stretch[: full * BLOCK].view(-1, BLOCK).mul_(scales[:full, None])  # (5)
        stretch[full * BLOCK :].mul_(scales[full:])
    return levels.to(dtype)


@functools.cache
def _pair_numbers() -> npt.NDArray[np.int64]:
    """Return the two levels that each byte stands for as one number of 8 bytes: a look-up finds both at once."""
    book, byte = _levels(), np.arange(256)
    return np.stack((book[byte >> 4], book[byte & 15]), axis=1).view(np.int64).ravel()


def block_magnitudes(weight: Nf4Weight, start: int, stop: int) -> Float[Tensor, " blocks"]:
    """Return the magnitudes of blocks `start` up to `stop`, by equation (4)."""
    if weight.nested_absmax is None or weight.offset is None:
        return weight.absmax[start:stop].float()
    first_group, full = start // NESTED_BLOCK, (stop - start // NESTED_BLOCK * NESTED_BLOCK) // NESTED_BLOCK
    origin = first_group * NESTED_BLOCK
    numbers = torch.index_select(dynamic_map(weight.device), 0, weight.absmax[origin:stop].int())
    nested = weight.nested_absmax[first_group:]
    numbers[: full * NESTED_BLOCK].view(-1, NESTED_BLOCK).mul_(nested[:full, None])
    numbers[full * NESTED_BLOCK :].mul_(nested[full : full + 1])
    return numbers.add_(weight.offset)[start - origin :]
