"""The gated activation of LLaMA's MLP (Shazeer 2020, arXiv:2002.05202) with a derived backward.

With σ the logistic function:

    y = g σ(g) u                                       (1)

Backward, with dy = dLoss/dy, from σ' = σ (1 - σ):

    du = dy g σ(g)                                     (2)
    dg = dy u σ(g) (1 + g (1 - σ(g)))                  (3)

Saved: g and u. σ(g) is recomputed; saving it would cost half as much memory again.
The arithmetic runs in float32 (float64 for float64) and is cast once at the end.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from entrenar.ops.first_order import refuse_double_backward


def reference_swiglu(gate: Float[Tensor, "... F"], up: Float[Tensor, "... F"]) -> Float[Tensor, "... F"]:
    """Return silu(gate) · up, as plain torch that autograd differentiates."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (torch.nn.functional.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """Return y of equation (1)."""
    return gate * torch.sigmoid(gate) * up  # (1)


def swiglu_backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return dgate and dup of equations (3) and (2)."""
    sigma = torch.sigmoid(gate)
    dup = dy * gate * sigma  # (2)
    dgate = dy * up * sigma * (1 + gate * (1 - sigma))  # (3)
    return dgate, dup


class SwiGLUFunction(torch.autograd.Function):
    """`swiglu_forward` and `swiglu_backward` on the tape."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Compute the output and save what the backward needs."""
        ctx.save_for_backward(gate, up)
        wide = torch.promote_types(gate.dtype, torch.float32)
        return swiglu_forward(gate.to(wide), up.to(wide)).to(gate.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Compute the gradients that are wanted."""
        refuse_double_backward("swiglu")
        gate, up = ctx.saved_tensors
        wide = torch.promote_types(gate.dtype, torch.float32)
        dgate, dup = swiglu_backward(dy.to(wide), gate.to(wide), up.to(wide))
        return (
            dgate.to(gate.dtype) if ctx.needs_input_grad[0] else None,
            dup.to(up.dtype) if ctx.needs_input_grad[1] else None,
        )


def swiglu(gate: Float[Tensor, "... F"], up: Float[Tensor, "... F"]) -> Float[Tensor, "... F"]:
    """Return silu(gate) · up."""
    apply: Callable[..., Tensor] = SwiGLUFunction.apply
    return apply(gate, up)
