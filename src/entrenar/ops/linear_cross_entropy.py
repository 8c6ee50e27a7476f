"""The output head and its loss in one operation that never holds the (N, V) logits.

With x (N, D), the head's weight W (V, D), targets t, and the sum over the rows n whose target is not ignored:

    z_nv = x_n · W_v                                   (1)
    l_n  = log Σ_v exp(z_nv)                           (2)
    L    = Σ_n l_n - z_n,t(n)                          (3)

Backward:

    dz_nv = exp(z_nv - l_n) - [v = t(n)]               (4)
    dx_n  = Σ_v dz_nv W_v                              (5)
    dW_v  = Σ_n dz_nv x_n                              (6)

L is a scalar, so its gradient is known but for one factor: each chunk of tokens computes (1) to (6) in the forward,
while its logits exist, and the backward multiplies by dLoss/dL. Ignored rows are dropped first and cost nothing;
dW is computed only where the weight is trained. Saved: dx, and dW in float32.
Idea of computing the gradient in the forward: Liger Kernel (Hsu et al. 2024, arXiv:2410.10989).
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from entrenar.errors import DataError
from entrenar.ops.first_order import refuse_double_backward

DEFAULT_CHUNK_SIZE = 256


def reference_linear_cross_entropy(
    x: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, " N"], *, ignore_index: int = -100
) -> Float32[Tensor, ""] | Float64[Tensor, ""]:
    """Sum the cross entropies of dense logits, as plain torch that autograd differentiates."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return cross_entropy(x.to(wide) @ weight.to(wide).mT, targets.long(), ignore_index=ignore_index, reduction="sum")


def cross_entropy_forward(logits: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss of equation (3) and the log-sum-exp of equation (2)."""
    shift = logits.amax(-1, keepdim=True)
    logsumexp = torch.log(torch.exp(logits - shift).sum(-1, keepdim=True)) + shift  # (2)
    return (logsumexp - (logits * one_hot).sum(-1, keepdim=True)).sum(), logsumexp  # (3)


def linear_cross_entropy_backward(
    x: Tensor, weight: Tensor, logits: Tensor, one_hot: Tensor, logsumexp: Tensor
) -> tuple[Tensor, Tensor]:
    """Return dx and dW of equations (4) to (6)."""
    dlogits = torch.exp(logits - logsumexp) - one_hot  # (4)
    return dlogits @ weight, dlogits.mT @ x  # (5), (6)


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Loss and gradient by chunks of tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, chunk_size: int) -> Tensor:
        """Compute the output and save what the backward needs."""
        wide = torch.promote_types(x.dtype, torch.float32)
        loss = x.new_zeros((), dtype=wide)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for start in range(0, x.shape[0], chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = (x[chunk] @ weight.mT).to(wide)  # (1)
            places = targets[chunk, None]
            log_probabilities = torch.log_softmax(logits, dim=-1)
            loss -= log_probabilities.gather(-1, places).sum()  # (3)
            if dx is None and dweight is None:
                continue
            dlogits = log_probabilities.exp_().scatter_add_(-1, places, torch.full_like(places, -1, dtype=wide))  # (4)
            dlogits = dlogits.to(x.dtype)
            if dx is not None:
                dx[chunk] = dlogits @ weight  # (5)
            if dweight is not None:
                dweight += dlogits.mT @ x[chunk]  # (6)
        ctx.save_for_backward(dx, dweight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Compute the gradients that are wanted."""
        refuse_double_backward("linear_cross_entropy")
        dx, dweight = ctx.saved_tensors
        return (
            None if dx is None else (dx * dloss).to(dx.dtype),
            None if dweight is None else (dweight * dloss).to(ctx.weight_dtype),
            None,
            None,
        )


def linear_cross_entropy(
    x: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    *,
    ignore_index: int = -100,
    chunk_size: int | None = None,
) -> Float32[Tensor, ""] | Float64[Tensor, ""]:
    """Sum over the targets that are not ignored: the cross entropy of the logits x Wᵀ.

    Raises:
        DataError: a target is neither `ignore_index` nor a row of the weight.
    """
    kept = (targets != ignore_index).nonzero().squeeze(-1)
    if len(kept) < len(targets):
        x = x.index_select(0, kept)
    targets = targets.index_select(0, kept).long()
    if len(kept) and not 0 <= int(targets.min()) <= int(targets.max()) < len(weight):
        row = int(((targets < 0) | (targets >= len(weight))).nonzero()[0])
        raise DataError(
            f"targets must be {ignore_index} (ignored) or in [0, {len(weight)}), got {int(targets[row])} "
            f"in row {int(kept[row])}: the tokenizer's vocabulary must fit the model's"
        )
    size = DEFAULT_CHUNK_SIZE if chunk_size is None else chunk_size
    apply: Callable[..., Tensor] = LinearCrossEntropyFunction.apply
    return apply(x, weight, targets, size)
