"""Rotary positions (Su et al. 2021, arXiv:2104.09864) in Hugging Face's half-split layout, with a derived backward.

A head of width K is K/2 planes; plane i holds coordinates i and i + K/2. At a token whose angle in plane i is θ_i,
with a the first half of the head and b the second:

    y_a = a cos θ - b sin θ                            (1)
    y_b = b cos θ + a sin θ                            (2)

This is a rotation, so its Jacobian is orthogonal and the transposed Jacobian is the rotation by -θ:

    da = dy_a cos θ + dy_b sin θ                       (3)
    db = dy_b cos θ - dy_a sin θ                       (4)

that is (1) and (2) with -sin. Saved: cos and sin alone, which every layer shares.
The arithmetic runs in float32 (float64 for float64) and is cast once at the end.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from entrenar.ops.first_order import refuse_double_backward
from entrenar.ops.row_blocks import row_blocks


def reference_rope(
    x: Float[Tensor, "B H T K"], cos: Float[Tensor, "#B T half"], sin: Float[Tensor, "#B T half"]
) -> Float[Tensor, "B H T K"]:
    """Rotate each plane of each head, in plain torch with autograd."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = (torch.cat((table, table), dim=-1).unsqueeze(1) for table in (cos, sin))
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def rope_forward(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the two halves of each head by equations (1) and (2)."""
    return first * cos - second * sin, second * cos + first * sin  # (1), (2)


def rope_backward(dfirst: Tensor, dsecond: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the gradient back by equations (3) and (4)."""
    return rope_forward(dfirst, dsecond, cos, -sin)  # (3), (4)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rotation: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    """Apply a rotation of halves to every head, by blocks of tokens."""
    wide, half = torch.promote_types(x.dtype, torch.float32), x.shape[-1] // 2
    cos, sin = (table.expand(x.shape[0], -1, -1).unsqueeze(1) for table in (cos, sin))  # (B, 1, T, K/2)
    y = torch.empty_like(x)
    for rows in row_blocks(x):
        for times in row_blocks(x[rows].transpose(0, 2)):
            block, out = x[rows, :, times].to(wide), y[rows, :, times]
            out[..., :half], out[..., half:] = rotation(
                block[..., :half], block[..., half:], cos[rows, :, times], sin[rows, :, times]
            )
    return y


class RopeFunction(torch.autograd.Function):
    """The arithmetic above on the tape; cos and sin are tables, not variables."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Compute y; save the tables."""
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin, rope_forward)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        """Compute dx."""
        refuse_double_backward("rope")
        cos, sin = ctx.saved_tensors
        return rotate(dy, cos, sin, rope_backward), None, None


def rope(
    x: Float[Tensor, "B H T K"], cos: Float[Tensor, "#B T half"], sin: Float[Tensor, "#B T half"]
) -> Float[Tensor, "B H T K"]:
    """Rotate each head of x by its token's angles; `half` is K/2, one angle for each plane."""
    apply: Callable[..., Tensor] = RopeFunction.apply
    return apply(x, cos, sin)
