"""The gated activation of LLaMA's MLP (Shazeer 2020, arXiv:2002.05202) with a derived backward.

With σ the logistic function:

    y = g σ(g) u                                       (1)

Backward, with dy = dLoss/dy, from σ' = σ (1 - σ):

    du = dy g σ(g)                                     (2)
    dg = dy u (σ(g) + g σ(g) (1 - σ(g)))               (3)

Saved: g and u. σ(g) is recomputed; saving it would cost half as much memory again.
The arithmetic runs in float32 (float64 for float64) and is cast once at the end.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import silu

from entrenar.ops.first_order import refuse_double_backward
from entrenar.ops.row_blocks import row_blocks


def reference_swiglu(gate: Float[Tensor, "... F"], up: Float[Tensor, "... F"]) -> Float[Tensor, "... F"]:
    """Return silu(gate) · up, as plain torch that autograd differentiates."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """Return y of equation (1)."""
    return silu(gate) * up  # (1)


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return dgate and dup of equations (3) and (2)."""
    sigma = torch.sigmoid(gate)
    activated = gate * sigma  # g σ(g)
    slope = torch.lerp(sigma, sigma.new_ones(()), activated)  # σ + gσ (1 - σ), in one pass over memory
    return dy * up * slope, dy * activated  # (3), (2)


class SwiGLUFunction(torch.autograd.Function):
    """The arithmetic above on the tape, by blocks of rows."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Compute y; save g and u."""
        ctx.save_for_backward(gate, up)
        wide = torch.promote_types(gate.dtype, torch.float32)
        gates, ups = (x.reshape(-1, gate.shape[-1]) for x in (gate, up))
        y = torch.empty_like(gates)
        for block in row_blocks(gates):
            y[block] = swiglu_forward(gates[block].to(wide), ups[block].to(wide))
        return y.reshape(gate.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Compute dgate and dup."""
        refuse_double_backward("swiglu")
        gate, up = ctx.saved_tensors
        wide = torch.promote_types(gate.dtype, torch.float32)
        gates, ups, dys = (x.reshape(-1, gate.shape[-1]) for x in (gate, up, dy))
        dgate, dup = torch.empty_like(gates), torch.empty_like(ups)
        for block in row_blocks(gates):
            dgate[block], dup[block] = swiglu_backward(dys[block].to(wide), gates[block].to(wide), ups[block].to(wide))
        return (
            dgate.reshape(gate.shape) if ctx.needs_input_grad[0] else None,
            dup.reshape(up.shape) if ctx.needs_input_grad[1] else None,
        )


def swiglu(gate: Float[Tensor, "... F"], up: Float[Tensor, "... F"]) -> Float[Tensor, "... F"]:
    """Return silu(gate) · up."""
    apply: Callable[..., Tensor] = SwiGLUFunction.apply
    return apply(gate, up)
