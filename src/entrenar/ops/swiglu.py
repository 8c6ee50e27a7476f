"""The gated activation of LLaMA's MLP (Shazeer 2020, arXiv:2002.05202) with a derived backward.

With σ the logistic function:

    y = g σ(g) u                                       (1)

Backward, with dy = dLoss/dy, from σ' = σ (1 - σ):

    du = dy g σ(g)                                     (2)
    dg = dy u (σ(g) + g σ(g) (1 - σ(g)))               (3)

Saved: g and u. σ(g) is recomputed; saving it would cost half as much memory again.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import silu

from entrenar.ops.first_order import refuse_double_backward


def reference_swiglu(gate: Float[Tensor, "... F"], up: Float[Tensor, "... F"]) -> Float[Tensor, "... F"]:
    """Return silu(gate) · up, in plain torch with autograd."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


class SwiGLUFunction(torch.autograd.Function):
    """Equations (1) to (3) in the fewest passes over memory that torch's kernels allow; each pass rounds its result.

    The kernels compute in float32 inside. Widening the tensors instead, so that only the last pass rounds, halves the
    error of a low-precision result and takes twice as long.
    """

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Compute y; save g and u."""
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)  # (1)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Compute dgate and dup, each only where it is wanted."""
        refuse_double_backward("swiglu")
        gate, up = ctx.saved_tensors
        dgate = dup = None
        if ctx.needs_input_grad[0]:
            dgate = dy * up
            torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)  # (3)
        if ctx.needs_input_grad[1]:
            dup = silu(gate).mul_(dy)  # (2)
        return dgate, dup


def swiglu(gate: Float[Tensor, "... F"], up: Float[Tensor, "... F"]) -> Float[Tensor, "... F"]:
    """Return silu(gate) · up."""
    apply: Callable[..., Tensor] = SwiGLUFunction.apply
    return apply(gate, up)
