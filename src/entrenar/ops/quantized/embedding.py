"""The rows of a quantized weight that some ids name: an embedding of which nothing else is ever widened.

A row of NF4 need not begin with a block nor with a byte, so each number is looked up by its place in the flat weight;
the other kinds are held row by row. The weight is frozen and ids have no gradient: there is nothing to derive.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entrenar.ops.quantized.bits import dequantize_nf_bits
from entrenar.ops.quantized.int8 import Int8Weight, dequantize_int8
from entrenar.ops.quantized.linear import QuantizedWeight
from entrenar.ops.quantized.nf4 import BLOCK, NESTED_BLOCK, Nf4Weight, dynamic_map, nf4_code_book

# Numbers looked up at once: their places take 8 bytes each.
_AT_ONCE = 1 << 18


def quantized_embedding(
    ids: Int[Tensor, "..."], weight: QuantizedWeight, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "... D"]:
    """Return a row for each id, computed in float32 and rounded once to `dtype`."""
    flat = ids.flatten()
    if isinstance(weight, Nf4Weight):
        rows = torch.empty(len(flat), weight.shape[1], dtype=dtype, device=weight.device)
        step = max(1, _AT_ONCE // weight.shape[1])
        for start in range(0, len(flat), step):
            rows[start : start + step] = _nf4_rows(weight, flat[start : start + step])
    elif isinstance(weight, Int8Weight):
        rows = dequantize_int8(weight, dtype, flat)
    else:
        rows = dequantize_nf_bits(weight, dtype, flat)
    return rows.view(*ids.shape, -1)


def _nf4_rows(weight: Nf4Weight, ids: Tensor) -> Tensor:
    places = ids[:, None] * weight.shape[1] + torch.arange(weight.shape[1], device=ids.device)
    pairs = weight.codes[places >> 1].int()
    levels = nf4_code_book(weight.device)[torch.where(places % 2 == 0, pairs >> 4, pairs & 15)]
    blocks = places // BLOCK
    magnitudes = weight.absmax[blocks]
    if weight.nested_absmax is not None and weight.offset is not None:
        nested = weight.nested_absmax[blocks // NESTED_BLOCK]
        magnitudes = dynamic_map(weight.device)[magnitudes.int()] * nested + weight.offset
    return levels * magnitudes
