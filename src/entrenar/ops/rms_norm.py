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


def reference_rms_norm(x: Float[Tensor, "... D"], weight: Float[Tensor, " D"], eps: float) -> Float[Tensor, "... D"]:
    """Normalize each row by its root mean square, as plain torch that autograd differentiates."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y and r of equations (1) and (2)."""
    rstd = torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)  # (1)
    return x * rstd * weight, rstd  # (2)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return dx of equation (3) and the rows of dweight before the sum of equation (4)."""
    x_hat = x * rstd
    dy_hat = dy * weight
    dx = (dy_hat - x_hat * (dy_hat * x_hat).mean(-1, keepdim=True)) * rstd  # (3)
    return dx, dy * x_hat  # (4)


class RMSNormFunction(torch.autograd.Function):
    """`rms_norm_forward` and `rms_norm_backward` on the tape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Compute the output and save what the backward needs."""
        wide = torch.promote_types(x.dtype, torch.float32)
        y, rstd = rms_norm_forward(x.to(wide), weight.to(wide), eps)
        ctx.save_for_backward(x, weight, rstd)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Compute the gradients that are wanted."""
        refuse_double_backward("rms_norm")
        x, weight, rstd = ctx.saved_tensors
        wide = rstd.dtype
        dx, dweight_rows = rms_norm_backward(dy.to(wide), x.to(wide), weight.to(wide), rstd)
        dweight = dweight_rows.reshape(-1, x.shape[-1]).sum(0)
        return (
            dx.to(x.dtype) if ctx.needs_input_grad[0] else None,
            dweight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            None,
        )


def rms_norm(x: Float[Tensor, "... D"], weight: Float[Tensor, " D"], eps: float) -> Float[Tensor, "... D"]:
    """Scale each row of x to root mean square 1, then by the weight."""
    apply: Callable[..., Tensor] = RMSNormFunction.apply
    return apply(x, weight, eps)
