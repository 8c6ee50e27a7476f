"""A frozen product with a trained low-rank correction (Hu et al. 2021, arXiv:2106.09685), with a derived backward.

With x (N, I), the weight W (O, I), the adapter A (R, I) and B (O, R), the scale s, and k (N, I) in {0, 1} saying which
inputs dropout keeps (all ones without dropout; s here holds dropout's 1/(1-p) already, because the branch is linear):

    u = (x ∘ k) Aᵀ                                     (1)
    y = x Wᵀ + s u Bᵀ                                  (2)

Backward, with dy = dLoss/dy. The branch is a chain of two products, so its gradient passes through du (N, R):

    du = s dy B                                        (3)
    dx = dy W + (du A) ∘ k                             (4)
    dA = duᵀ (x ∘ k)                                   (5)
    dB = s dyᵀ u                                       (6)
    dW = dyᵀ x                                         (7)

Associated this way nothing between the products is wider than R, and A and B never meet: B A is as large as W. A frozen
W has no (7), which is a third of a layer's arithmetic. The mask belongs in (4) as much as in (5): without it in (4)
the layers below learn from inputs that the branch never saw.

Saved: x, W, A, B, k as one byte an element, and u, which is R/I of x and would cost a pass over x to make again.
The branch is added to the product's own buffer, so it is never a tensor of its own in either direction. Where two
orders of a thin product are equal, the one that reads its wide operand row by row is measured to be faster: (6) is
computed as (uᵀ dy)ᵀ.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from entrenar.ops.first_order import refuse_double_backward
from entrenar.ops.linear import linear_backward_input, linear_backward_weight, linear_forward

# Sixteen random bits decide on one element, four elements to a draw: torch's own Bernoulli takes a draw for each and
# cost as much as the product itself.
_CHANCES = 1 << 16
_ELEMENTS_PER_DRAW = 4


def reference_lora_linear(
    x: Float[Tensor, "... I"],
    weight: Float[Tensor, "O I"],
    lora_a: Float[Tensor, "R I"],
    lora_b: Float[Tensor, "O R"],
    *,
    scale: float,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "... O"]:
    """Return x Wᵀ + s (dropout(x) Aᵀ) Bᵀ, in plain torch with autograd."""
    dropped = x
    if dropout > 0:
        kept, chance = draw_kept(x, dropout, generator)
        dropped = x * kept / chance
    return x @ weight.mT + scale * (dropped @ lora_a.to(x.dtype).mT) @ lora_b.to(x.dtype).mT


def branch(x: Tensor, lora_a: Tensor, kept: Tensor | None) -> Tensor:
    """Return u of equation (1)."""
    return (x if kept is None else x * kept) @ lora_a.mT  # (N, I) @ (I, R)  (1)


def add_branch(y: Tensor, low: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """Add s u Bᵀ to y in place, by equation (2)."""
    return y.addmm_(low, lora_b.mT, alpha=scale)  # (N, R) @ (R, O)  (2)


def branch_gradient(dy: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """Return du of equation (3)."""
    return (dy @ lora_b).mul_(scale)  # (N, O) @ (O, R)  (3)


def add_branch_gradient(dx: Tensor, dlow: Tensor, lora_a: Tensor, kept: Tensor | None) -> Tensor:
    """Add (du A) ∘ k to dx in place, by equation (4); dx may be wider than the product."""
    if kept is None and dx.dtype == dlow.dtype:
        return dx.addmm_(dlow, lora_a)  # (N, R) @ (R, I)  (4)
    product = (dlow @ lora_a).to(dx.dtype)
    return dx.add_(product) if kept is None else dx.addcmul_(product, kept.to(dx.dtype))  # (4)


def lora_a_gradient(dlow: Tensor, x: Tensor, kept: Tensor | None) -> Tensor:
    """Return dA of equation (5)."""
    return dlow.mT @ (x if kept is None else x * kept)  # (R, N) @ (N, I)  (5)


def lora_b_gradient(dy: Tensor, low: Tensor, scale: float) -> Tensor:
    """Return dB of equation (6)."""
    return (low.mT @ dy).mul_(scale).mT  # ((R, N) @ (N, O))ᵀ  (6)


class LoraLinearFunction(torch.autograd.Function):
    """The equations above on the tape, each sum of products in one buffer, only the wanted gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        kept: Tensor | None,
        scale: float,
        compute_dtype: torch.dtype,
    ) -> Tensor:
        """Compute the output and save what the backward needs."""
        rows = x.reshape(-1, x.shape[-1]).to(compute_dtype)  # (N, I)
        low = branch(rows, lora_a.to(compute_dtype), None if kept is None else kept.reshape(rows.shape))
        y = linear_forward(rows, weight.to(compute_dtype))  # (N, O)
        add_branch(y, low, lora_b.to(compute_dtype), scale)
        ctx.save_for_backward(x, weight, lora_a, lora_b, kept, low)
        ctx.scale, ctx.compute_dtype = scale, compute_dtype
        return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients that are wanted."""
        refuse_double_backward("lora_linear")
        x, weight, lora_a, lora_b, kept, low = ctx.saved_tensors
        wide = ctx.compute_dtype
        wants_x, wants_weight, wants_a, wants_b = ctx.needs_input_grad[:4]
        dy = dy.reshape(-1, dy.shape[-1]).to(wide)  # (N, O)
        rows = x.reshape(-1, x.shape[-1]).to(wide) if wants_weight or wants_a else None  # (N, I)
        kept = None if kept is None else kept.reshape(-1, x.shape[-1])
        dx = dweight = dlora_a = dlora_b = None
        if wants_x or wants_a:
            dlow = branch_gradient(dy, lora_b.to(wide), ctx.scale)  # (N, R)
        if wants_x:
            dx = linear_backward_input(dy, weight.to(wide))
            dx = add_branch_gradient(dx, dlow, lora_a.to(wide), kept).to(x.dtype).view(x.shape)
        if wants_a and rows is not None:
            dlora_a = lora_a_gradient(dlow, rows, kept).to(lora_a.dtype)
        if wants_b:
            dlora_b = lora_b_gradient(dy, low, ctx.scale).to(lora_b.dtype)
        if wants_weight and rows is not None:
            dweight = linear_backward_weight(dy, rows).to(weight.dtype)  # (7)
        return dx, dweight, dlora_a, dlora_b, None, None, None


def draw_kept(x: Tensor, dropout: float, generator: torch.Generator | None) -> tuple[Tensor, float]:
    """Return which elements of x dropout keeps, and the chance of being kept: 1-p to the nearest 1/65536."""
    kept_chances = min(max(1, round((1 - dropout) * _CHANCES)), _CHANCES - 1)
    draws = torch.empty(-(-x.numel() // _ELEMENTS_PER_DRAW), dtype=torch.int64, device=x.device)
    bits = draws.random_(-(1 << 63), None, generator=generator).view(torch.int16)[: x.numel()]
    return (bits < kept_chances - _CHANCES // 2).view(x.shape), kept_chances / _CHANCES


def lora_linear(
    x: Float[Tensor, "... I"],
    weight: Float[Tensor, "O I"],
    lora_a: Float[Tensor, "R I"],
    lora_b: Float[Tensor, "O R"],
    *,
    scale: float,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Float[Tensor, "... O"]:
    """Return x Wᵀ + scale · (dropout(x) Aᵀ) Bᵀ in x's dtype, multiplied in `compute_dtype` (None: x's).

    `dropout` in [0, 1) is the chance of an element of x to be dropped from the branch, never from x Wᵀ. Without a
    generator the mask comes from torch's own, the one that activation checkpointing replays in its second forward.
    """
    kept = None
    if dropout > 0:
        kept, chance = draw_kept(x, dropout, generator)
        scale = scale / chance
    apply: Callable[..., Tensor] = LoraLinearFunction.apply
    return apply(x, weight, lora_a, lora_b, kept, scale, compute_dtype or x.dtype)
