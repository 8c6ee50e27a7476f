"""The two orders of the rows of a query or key projection.

Rotary positions turn pairs of coordinates of a head. Hugging Face pairs coordinate i with i + K/2 (half-split), Meta,
llama2.c and GGML pair 2i with 2i + 1 (interleaved). The same model in the other order has its rows permuted.
"""

from jaxtyping import Float
from torch import Tensor


def interleaved(weight: Float[Tensor, "rows D"], num_heads: int) -> Float[Tensor, "rows D"]:
    """Return half-split rows in interleaved order."""
    rows, width = weight.shape
    return weight.view(num_heads, 2, rows // num_heads // 2, width).transpose(1, 2).reshape(rows, width)


def half_split(weight: Float[Tensor, "rows D"], num_heads: int) -> Float[Tensor, "rows D"]:
    """Return interleaved rows in half-split order."""
    rows, width = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, width).transpose(1, 2).reshape(rows, width)
