"""An embedding that is held in few bits: only the rows that are looked up are ever widened.

The weight is frozen and ids have no gradient, so there is nothing to derive.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entrenar.ops.quantized.protocol import QuantizedWeight


def quantized_embedding(
    ids: Int[Tensor, "..."], weight: QuantizedWeight, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "... D"]:
    """Return a row for each id, computed in float32 and rounded once to `dtype`."""
    return weight.dequantize(dtype, ids.flatten()).view(*ids.shape, -1)
