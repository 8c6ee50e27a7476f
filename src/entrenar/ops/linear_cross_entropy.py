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
dW is computed only where the weight is trained. Saved: dx and dW, in float32, cast once
when they are multiplied. A quantized head, which is never trained, is widened tile by tile for each chunk.
Idea of computing the gradient in the forward: Liger Kernel (Hsu et al. 2024, arXiv:2410.10989).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from entrenar.errors import ConfigError, DataError
from entrenar.ops.first_order import refuse_double_backward
from entrenar.ops.quantized.linear import tiles
from entrenar.ops.quantized.protocol import QuantizedWeight
from entrenar.ops.row_blocks import row_blocks

# Numbers in a widened tile of a frozen head: small beside the head, and a product with it runs at full speed.
_TILE = 1 << 21


def reference_linear_cross_entropy(
    x: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], targets: Int[Tensor, " N"], *, ignore_index: int = -100
) -> Float32[Tensor, ""] | Float64[Tensor, ""]:
    """Sum the cross entropies of dense logits, in plain torch with autograd."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return cross_entropy(x.to(wide) @ weight.to(wide).mT, targets.long(), ignore_index=ignore_index, reduction="sum")


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Loss and gradient by chunks of tokens, each chunk's logits in the same buffer."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | QuantizedWeight,
        targets: Tensor,
        chunk_size: int,
        compute_dtype: torch.dtype,
    ) -> Tensor:
        """Compute the loss and, if requested, dx and dW for an upstream gradient of one."""
        wide = torch.promote_types(x.dtype, torch.float32)
        head = _head_tiles(weight, compute_dtype, is_trained=ctx.needs_input_grad[1])
        loss = x.new_zeros((), dtype=wide)
        dx = x.new_empty(x.shape, dtype=wide) if ctx.needs_input_grad[0] else None
        dweight = x.new_zeros(weight.shape, dtype=wide) if ctx.needs_input_grad[1] else None
        buffer = x.new_empty((min(chunk_size, x.shape[0]), weight.shape[0]), dtype=wide)
        for start in range(0, x.shape[0], chunk_size):
            chunk = slice(start, start + chunk_size)
            tokens, places = x[chunk].to(compute_dtype), targets[chunk, None]
            logits = buffer[: tokens.shape[0]]
            for columns, tile in head():
                write_product(tokens, tile.mT, out=logits[:, columns])  # (1)
            log_probabilities = torch.log_softmax(logits, dim=-1, out=logits)  # z - l, (2)
            loss -= log_probabilities.gather(-1, places).sum()  # (3)
            if dx is None and dweight is None:
                continue
            dlogits = log_probabilities.exp_().scatter_add_(-1, places, places.new_full(places.shape, -1, dtype=wide))
            dlogits = dlogits.to(compute_dtype)  # (4)
            if dx is not None:
                for columns, tile in head():
                    into = write_product if columns.start in (None, 0) else add_product
                    into(dlogits[:, columns], tile, out=dx[chunk])  # (5)
            if dweight is not None:
                add_product(dlogits.mT, tokens, out=dweight)  # (6)
        ctx.save_for_backward(dx, dweight)
        ctx.dtypes = x.dtype, weight.dtype if isinstance(weight, Tensor) else None
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Multiply what the forward computed by the upstream gradient."""
        refuse_double_backward("linear_cross_entropy")
        dx, dweight = (
            None if grad is None else scale_rows(grad, dloss, dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return dx, dweight, None, None, None


def _head_tiles(
    weight: Tensor | QuantizedWeight, dtype: torch.dtype, *, is_trained: bool
) -> Callable[[], Iterable[tuple[slice, Tensor]]]:
    """Return what yields the head's rows in `dtype`.

    All at once, if they are stored so or dW takes their size anyway; else tile by tile, widened each time: a frozen
    head in two precisions would be the largest thing in memory.
    """
    if not isinstance(weight, Tensor):
        return lambda: tiles(weight, dtype)
    if weight.dtype == dtype or is_trained:
        whole = [(slice(None), weight.to(dtype))]
        return lambda: whole
    rows = max(1, _TILE // weight.shape[1])
    pieces = [slice(start, start + rows) for start in range(0, len(weight), rows)]
    return lambda: ((piece, weight[piece].to(dtype)) for piece in pieces)


def write_product(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    """Write a @ b to `out`; its dtype may be wider."""
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else out.copy_(a @ b)


def add_product(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    """Add a @ b to `out`; its dtype may be wider."""
    return out.addmm_(a, b) if a.dtype == out.dtype else out.add_(a @ b)


def scale_rows(grad: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return grad · scale, cast once, without a wide copy of the whole."""
    scaled = torch.empty_like(grad, dtype=dtype)
    for block in row_blocks(grad):
        scaled[block] = grad[block] * scale
    return scaled


def default_chunk_size(vocab_size: int) -> int:
    """Return how many tokens a chunk holds: few enough for the cache, enough to pay for each pass over dW."""
    return max(128, 2**23 // max(1, vocab_size))


def linear_cross_entropy(
    x: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"] | QuantizedWeight,
    targets: Int[Tensor, " N"],
    *,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    compute_dtype: torch.dtype | None = None,
    is_checked: bool = False,
) -> Float32[Tensor, ""] | Float64[Tensor, ""]:
    """Sum over the targets that are not ignored: the cross entropy of the logits x Wᵀ, multiplied in `compute_dtype`.

    `is_checked` says that none is ignored and each is a row of the weight, so that a device need not be asked.

    Raises:
        ConfigError: chunk_size is not positive.
        DataError: a target is neither `ignore_index` nor a row of the weight.
    """
    chunk_size = default_chunk_size(weight.shape[0]) if chunk_size is None else chunk_size
    if chunk_size < 1:
        raise ConfigError(f"chunk_size must be at least 1 token, got {chunk_size}: leave it out for the default")
    if not is_checked:
        x, targets = _asked_rows(x, targets, ignore_index, weight.shape[0])
    targets = targets.long()
    if not torch.is_grad_enabled():
        x = x.detach()  # needs_input_grad alone would not say that no gradient is wanted
        weight = weight.detach() if isinstance(weight, Tensor) else weight
    apply: Callable[..., Tensor] = LinearCrossEntropyFunction.apply
    return apply(x, weight, targets, chunk_size, compute_dtype or x.dtype)


def _asked_rows(x: Tensor, targets: Tensor, ignore_index: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return the rows whose target is not ignored, and their targets."""
    kept = (targets != ignore_index).nonzero().squeeze(-1)
    if len(kept) < len(targets):
        x = x.index_select(0, kept)
    targets = targets.index_select(0, kept)
    if len(kept) and not 0 <= int(targets.min()) <= int(targets.max()) < vocab_size:
        row = int(((targets < 0) | (targets >= vocab_size)).nonzero()[0])
        raise DataError(
            f"targets must be {ignore_index} (ignored) or in [0, {vocab_size}), got {int(targets[row])} "
            f"in row {int(kept[row])}: the tokenizer's vocabulary must fit the model's"
        )
    return x, targets
