"""Root-mean-square normalization (Zhang and Sennrich 2019, arXiv:1910.07467) with a derived backward.

For one row x of width D and a weight w:

    r   = (mean(x²) + eps)^(-1/2)                      (1)
    y_i = x_i r w_i                                    (2)

Backward, with g = dLoss/dy. From (1), dr/dx_j = -r³ x_j / D. With (2):

    dx_j = r w_j g_j - r³ x_j / D · Σ_i g_i w_i x_i    (3)
    dw_i = Σ_rows g_i x_i r                            (4)

Saved: x, w and r (one number a row, at least float32), so that the backward reads x once and takes no root.
The arithmetic runs in float32 (float64 for float64) and is cast once at the end.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from entrenar.ops.first_order import refuse_double_backward
from entrenar.ops.row_blocks import row_blocks


def reference_rms_norm(x: Float[Tensor, "... D"], weight: Float[Tensor, " D"], eps: float) -> Float[Tensor, "... D"]:
    """Normalize each row by its root mean square, in plain torch with autograd."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y and r of equations (1) and (2)."""
    rstd = torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)  # (1)
    return x * rstd * weight, rstd  # (2)


def rms_norm_backward_x(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """Return dx of equation (3)."""
    projection = (dy * x) @ weight.unsqueeze(-1)  # Σ_i g_i w_i x_i, (N, 1)
    return dy * weight * rstd - x * (projection * rstd * rstd * rstd / x.shape[-1])  # (3)


def rms_norm_backward_weight(dy: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """Return dw of equation (4)."""
    return (rstd.mT @ (dy * x)).squeeze(0)  # (1, N) (N, D) = (4)


class RMSNormFunction(torch.autograd.Function):
    """The arithmetic above on the tape, by blocks of rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Compute y; save x, w and r."""
        wide = torch.promote_types(x.dtype, torch.float32)
        rows, w = x.reshape(-1, x.shape[-1]), weight.to(wide)
        y = torch.empty_like(rows)
        rstd = rows.new_empty((rows.shape[0], 1), dtype=wide)
        for block in row_blocks(rows):
            y[block], rstd[block] = rms_norm_forward(rows[block].to(wide), w, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y.reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Compute dx and dw, each only where it is wanted."""
        refuse_double_backward("rms_norm")
        x, weight, rstd = ctx.saved_tensors
        wide = rstd.dtype
        rows, dy_rows, w = x.reshape(-1, x.shape[-1]), dy.reshape(-1, x.shape[-1]), weight.to(wide)
        dx = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(w) if ctx.needs_input_grad[1] else None
        for block in row_blocks(rows):
            x_block, dy_block = rows[block].to(wide), dy_rows[block].to(wide)
            if dx is not None:
                dx[block] = rms_norm_backward_x(dy_block, x_block, w, rstd[block])
            if dweight is not None:
                dweight += rms_norm_backward_weight(dy_block, x_block, rstd[block])
        return (
            None if dx is None else dx.reshape(x.shape),
            None if dweight is None else dweight.to(weight.dtype),
            None,
        )


def rms_norm(x: Float[Tensor, "... D"], weight: Float[Tensor, " D"], eps: float) -> Float[Tensor, "... D"]:
    """Scale each row of x to root mean square 1, then by the weight."""
    apply: Callable[..., Tensor] = RMSNormFunction.apply
    return apply(x, weight, eps)
