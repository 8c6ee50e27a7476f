"""A product with a quantized weight and a trained low-rank correction, one tile of the weight at a time.

With x (N, I), the quantized weight W (O, I), A, B, s and k as in `lora_linear`, and W_t, y_t the rows of W and the
columns of y that tile t covers:

    y_t = x W_tᵀ                                       (1)
    dx = Σ_t dy_t W_t                                  (2)

The correction, forward and backward, is `lora_linear`'s equations (1) to (6), whose arithmetic is called here.

The rows of a weight lie one after the other, so a tile of rows is one run of codes: it is widened, multiplied and
dropped in the forward, and widened again in the backward (QLoRA, arXiv:2305.14314, section 3: stored in four bits,
computed in the precision of the activations). The widened weight never exists as a whole. Widening a tile costs about
a twentieth of a product with 512 rows (docs/log.md).

Saved: the codes and scales themselves, A, B, k and u, and x where A learns; without an adapter nothing of x. All of
them go through `save_for_backward`: checkpointing, offloading and the check for changes in place do not see what lies
elsewhere on the context, and then give wrong gradients without a word (bitsandbytes issue 2034).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from entrenar.ops.first_order import refuse_double_backward
from entrenar.ops.lora_linear import (
    add_branch,
    add_branch_gradient,
    branch,
    branch_gradient,
    draw_kept,
    lora_a_gradient,
    lora_b_gradient,
    reference_lora_linear,
)
from entrenar.ops.quantized.protocol import QuantizedWeight

# Numbers in a tile: large enough that a product with it runs at full speed, small beside any weight. Its rows come in
# multiples of a block, so that each tile of NF4 begins with one.
_TILE, _ROWS = 1 << 20, 64


def tiles(
    weight: QuantizedWeight, dtype: torch.dtype, tile_rows: int | None = None
) -> Iterator[tuple[slice, Float[Tensor, "rows I"]]]:
    """Yield one widened tile of rows after the other, each with its range; None: a million numbers in each."""
    num_rows, width = weight.shape
    size = tile_rows or max(_ROWS, _TILE // width // _ROWS * _ROWS)
    for start in range(0, num_rows, size):
        rows = slice(start, min(start + size, num_rows))
        yield rows, weight.dequantize(dtype, rows)


def reference_quantized_linear(
    x: Float[Tensor, "... I"],
    weight: QuantizedWeight,
    lora_a: Float[Tensor, "R I"] | None = None,
    lora_b: Float[Tensor, "O R"] | None = None,
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "... O"]:
    """Return x Wᵀ + s (dropout(x) Aᵀ) Bᵀ over the whole widened W, in plain torch with autograd."""
    wide = weight.dequantize(x.dtype)
    if lora_a is None or lora_b is None:
        return x @ wide.mT
    return reference_lora_linear(x, wide, lora_a, lora_b, scale=scale, dropout=dropout, generator=generator)


@dataclass(frozen=True)
class _Plan:
    """The settings of the product: everything that is not a tensor."""

    scale: float
    compute_dtype: torch.dtype
    tile_rows: int | None
    shape: tuple[int, int]
    make: Callable[..., QuantizedWeight]

    def weight(self, tensors: Sequence[Any]) -> QuantizedWeight:
        """Put the weight together again from the tensors that went through `save_for_backward`."""
        return self.make(*tensors, self.shape)


def frozen_output(rows: Tensor, weight: QuantizedWeight, plan: _Plan) -> Tensor:
    """Return y of equation (1), a tile's columns at a time."""
    y = rows.new_empty(len(rows), plan.shape[0])  # (N, O)
    for columns, tile in tiles(weight, plan.compute_dtype, plan.tile_rows):
        torch.mm(rows, tile.mT, out=y[:, columns])  # (N, I) @ (I, tile)  (1)
    return y


def frozen_input_gradient(dy: Tensor, weight: QuantizedWeight, plan: _Plan) -> Tensor:
    """Return the sum of equation (2) over the tiles, in float32 or better."""
    dx = None
    for columns, tile in tiles(weight, plan.compute_dtype, plan.tile_rows):
        if dx is None:
            dx = (dy[:, columns] @ tile).to(torch.promote_types(dy.dtype, torch.float32))  # (N, tile) @ (tile, I)  (2)
        elif tile.dtype == dx.dtype:
            dx.addmm_(dy[:, columns], tile)  # (2)
        else:
            dx += dy[:, columns] @ tile  # (2)
    return dy.new_zeros(len(dy), plan.shape[1]) if dx is None else dx


class QuantizedLinearFunction(torch.autograd.Function):
    """The equations on the tape, tile by tile, only the wanted gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        kept: Tensor | None,
        plan: _Plan,
        *weight: Any,
    ) -> Tensor:
        """Compute the output and save what the backward needs."""
        wide = plan.compute_dtype
        rows = x.reshape(-1, plan.shape[1]).to(wide)  # (N, I)
        y = frozen_output(rows, plan.weight(weight), plan)
        low = None
        if lora_a is not None and lora_b is not None:
            low = branch(rows, lora_a.to(wide), None if kept is None else kept.reshape(rows.shape))  # (N, R)
            add_branch(y, low, lora_b.to(wide), plan.scale)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, lora_a, lora_b, kept, low, *weight)
        ctx.plan, ctx.x_shape, ctx.x_dtype = plan, x.shape, x.dtype
        return y.to(x.dtype).view(*x.shape[:-1], plan.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients that are wanted."""
        refuse_double_backward("quantized_linear")
        x, lora_a, lora_b, kept, low, *weight = ctx.saved_tensors
        plan: _Plan = ctx.plan
        wide = plan.compute_dtype
        wants_x, wants_a, wants_b = ctx.needs_input_grad[:3]
        dy = dy.reshape(-1, plan.shape[0]).to(wide)  # (N, O)
        kept = None if kept is None else kept.reshape(-1, plan.shape[1])
        dx = dlora_a = dlora_b = dlow = None
        if lora_b is not None and (wants_x or wants_a):
            dlow = branch_gradient(dy, lora_b.to(wide), plan.scale)  # (N, R)
        if wants_x:
            dx = frozen_input_gradient(dy, plan.weight(weight), plan)
            if dlow is not None:
                dx = add_branch_gradient(dx, dlow, lora_a.to(wide), kept)
            dx = dx.to(ctx.x_dtype).view(ctx.x_shape)
        if wants_a and dlow is not None:
            rows = x.reshape(-1, plan.shape[1]).to(wide)  # (N, I)
            dlora_a = lora_a_gradient(dlow, rows, kept).to(lora_a.dtype)
        if wants_b:
            dlora_b = lora_b_gradient(dy, low, plan.scale).to(lora_b.dtype)
        return dx, dlora_a, dlora_b, *[None] * (len(ctx.needs_input_grad) - 3)


def quantized_linear(  # noqa: PLR0913  # lora_linear's, and the size of a tile
    x: Float[Tensor, "... I"],
    weight: QuantizedWeight,
    lora_a: Float[Tensor, "R I"] | None = None,
    lora_b: Float[Tensor, "O R"] | None = None,
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
    compute_dtype: torch.dtype | None = None,
    tile_rows: int | None = None,
) -> Float[Tensor, "... O"]:
    """Return x Wᵀ + scale · (dropout(x) Aᵀ) Bᵀ in x's dtype, multiplied in `compute_dtype` (None: x's).

    Without A and B it is the product alone. `tile_rows` rows of the weight are widened at a time (None: a million
    numbers). Dropout is `lora_linear`'s.
    """
    kept = None
    if dropout > 0 and lora_a is not None:
        kept, chance = draw_kept(x, dropout, generator)
        scale = scale / chance
    plan = _Plan(scale, compute_dtype or x.dtype, tile_rows, weight.shape, type(weight))
    apply: Callable[..., Tensor] = QuantizedLinearFunction.apply
    return apply(x, lora_a, lora_b, kept, plan, *weight.tensors().values())
