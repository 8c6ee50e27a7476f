"""A product with a weight in a few bits and a trained low-rank correction, one tile of the weight at a time.

With x (N, I), the quantized weight W (O, I) as `nf4` or `nf_bits` reads it, A, B, s and k as in `lora_linear`, and W_t,
B_t, y_t the rows of W and B and the columns of y that tile t covers:

    u = (x ∘ k) Aᵀ                                     (1)
    y_t = x W_tᵀ + s u B_tᵀ                            (2)

Backward, with dy_t the columns of dy = dLoss/dy that tile t covers:

    du = s dy B                                        (3)
    dx = Σ_t dy_t W_t + (du A) ∘ k                     (4)
    dA = duᵀ (x ∘ k)                                   (5)
    dB = s dyᵀ u                                       (6)

The rows of a weight lie one after the other, so a tile of rows is one run of codes: it is made, multiplied and dropped
in the forward, and made anew in the backward (QLoRA, arXiv:2305.14314, section 3: stored in four bits, computed in the
precision of the activations). The widened weight never exists as a whole. Making a tile costs about a twentieth of a
product with 512 rows (docs/log.md).

Saved: the codes and scales themselves, A, B, k and u, and x where A learns; without an adapter nothing of x. All of
them go through `save_for_backward`: what lies on the context beside it is not seen by checkpointing, by offloading or
by the check for changes in place, and gives wrong gradients without a word (bitsandbytes issue 2034).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear

from entrenar.ops.first_order import refuse_double_backward
from entrenar.ops.lora_linear import draw_kept, reference_lora_linear
from entrenar.ops.quantized.bits import NfBitsWeight, dequantize_nf_bits
from entrenar.ops.quantized.int8 import Int8Weight, dequantize_int8
from entrenar.ops.quantized.nf4 import BLOCK, Nf4Weight, dequantize_nf4

# Numbers in a tile: large enough that a product with it runs at full speed, small beside any weight.
_TILE = 1 << 20

QuantizedWeight = Nf4Weight | NfBitsWeight | Int8Weight


def dequantize(
    weight: QuantizedWeight, dtype: torch.dtype = torch.float32, rows: slice | None = None
) -> Float[Tensor, "rows I"]:
    """Return some rows of a quantized weight, computed in float32 and rounded once to `dtype`."""
    if isinstance(weight, NfBitsWeight):
        return dequantize_nf_bits(weight, dtype, rows)
    if isinstance(weight, Int8Weight):
        return dequantize_int8(weight, dtype, rows)
    return dequantize_nf4(weight, dtype, rows)


def tiles(
    weight: QuantizedWeight, dtype: torch.dtype, tile_rows: int | None = None
) -> Iterator[tuple[slice, Float[Tensor, "rows I"]]]:
    """Widen one tile of rows after the other, each with the rows that it is; None: a megabyte's worth of numbers."""
    num_rows, width = weight.shape
    size = tile_rows or max(BLOCK, _TILE // width // BLOCK * BLOCK)
    for start in range(0, num_rows, size):
        rows = slice(start, min(start + size, num_rows))
        yield rows, dequantize(weight, dtype, rows)


def reference_nf4_linear(
    x: Float[Tensor, "... I"],
    weight: QuantizedWeight,
    lora_a: Float[Tensor, "R I"] | None = None,
    lora_b: Float[Tensor, "O R"] | None = None,
    *,
    scale: float = 1.0,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "... O"]:
    """Return x Wᵀ + s (dropout(x) Aᵀ) Bᵀ over the whole widened W, as plain torch that autograd differentiates."""
    wide = dequantize(weight, x.dtype)
    if lora_a is None or lora_b is None:
        return x @ wide.mT
    return reference_lora_linear(x, wide, lora_a, lora_b, scale=scale, dropout=dropout, generator=generator)


def nf4_linear_forward(
    x: Tensor, tile: Tensor, lora_a: Tensor, lora_b_tile: Tensor, kept: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the columns of y that a tile covers, and u, of equations (2) and (1)."""
    low = (x * kept) @ lora_a.mT  # (N, I) @ (I, R)  (1)
    return x @ tile.mT + low @ lora_b_tile.mT * scale, low  # (N, I) @ (I, tile) + (N, R) @ (R, tile)  (2)


def nf4_linear_backward(
    dy: Tensor,
    x: Tensor,
    tiles: tuple[Tensor, ...],
    lora_a: Tensor,
    lora_b: Tensor,
    kept: Tensor,
    low: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dA and dB of equations (3) to (6)."""
    dlow = dy @ lora_b * scale  # (N, O) @ (O, R)  (3)
    dx = dlow @ lora_a * kept  # (N, R) @ (R, I)
    start = 0
    for tile in tiles:
        stop = start + tile.shape[0]
        dx = dx + dy[:, start:stop] @ tile  # (N, tile) @ (tile, I)  (4)
        start = stop
    dlora_a = dlow.mT @ (x * kept)  # (R, N) @ (N, I)  (5)
    return dx, dlora_a, dy.mT @ low * scale  # (O, N) @ (N, R)  (6)


@dataclass(frozen=True)
class _Plan:
    """How the product is computed: what is no tensor."""

    scale: float
    compute_dtype: torch.dtype
    tile_rows: int | None
    shape: tuple[int, int]
    kind: Callable[..., QuantizedWeight]

    def tiles(self, tensors: Sequence[Any]) -> Iterator[tuple[slice, Tensor]]:
        """Make one tile of the weight after the other, with the columns of y that it covers."""
        return tiles(self.kind(*tensors, self.shape), self.compute_dtype, self.tile_rows)


class Nf4LinearFunction(torch.autograd.Function):
    """The same arithmetic on the tape, tile by tile, only the wanted gradients."""

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
        rows = x.reshape(-1, plan.shape[1]).to(plan.compute_dtype)  # (N, I)
        y = rows.new_empty(len(rows), plan.shape[0])  # (N, O)
        for columns, tile in plan.tiles(weight):
            torch.mm(rows, tile.mT, out=y[:, columns])
        low = None
        if lora_a is not None and lora_b is not None:
            dropped = rows if kept is None else rows * kept.reshape(rows.shape)
            low = linear(dropped, lora_a.to(plan.compute_dtype))  # (N, R)  (1)
            y.addmm_(low, lora_b.to(plan.compute_dtype).mT, alpha=plan.scale)  # (2)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, lora_a, lora_b, kept, low, *weight)
        ctx.plan, ctx.x_shape, ctx.x_dtype = plan, x.shape, x.dtype
        return y.to(x.dtype).view(*x.shape[:-1], plan.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients that are wanted."""
        refuse_double_backward("nf4_linear")
        x, lora_a, lora_b, kept, low, *weight = ctx.saved_tensors
        plan: _Plan = ctx.plan
        wide = plan.compute_dtype
        wants_x, wants_a, wants_b = ctx.needs_input_grad[:3]
        dy = dy.reshape(-1, plan.shape[0]).to(wide)  # (N, O)
        kept = None if kept is None else kept.reshape(-1, plan.shape[1])
        dx = dlora_a = dlora_b = dlow = None
        if lora_b is not None and (wants_x or wants_a):
            dlow = (dy @ lora_b.to(wide)).mul_(plan.scale)  # (N, R)  (3)
        if wants_x:
            dx = _dx(dy, weight, plan)
            if dlow is not None:
                branch = dlow @ lora_a.to(wide)
                dx += branch if kept is None else branch.mul_(kept)
            dx = dx.to(ctx.x_dtype).view(ctx.x_shape)
        if wants_a and dlow is not None:
            rows = x.reshape(-1, plan.shape[1]).to(wide)  # (N, I)
            dlora_a = (dlow.mT @ (rows if kept is None else rows * kept)).to(lora_a.dtype)  # (5)
        if wants_b:
            dlora_b = (low.mT @ dy).mul_(plan.scale).mT.to(lora_b.dtype)  # (6)
        return dx, dlora_a, dlora_b, *[None] * (len(ctx.needs_input_grad) - 3)


def _dx(dy: Tensor, weight: Sequence[Tensor], plan: _Plan) -> Tensor:
    """Return the sum of equation (4) over the tiles, in float32 or better."""
    dx = None
    for columns, tile in plan.tiles(weight):
        if dx is None:
            dx = (dy[:, columns] @ tile).to(torch.promote_types(dy.dtype, torch.float32))  # (N, tile) @ (tile, I)
        elif tile.dtype == dx.dtype:
            dx.addmm_(dy[:, columns], tile)
        else:
            dx += dy[:, columns] @ tile
    return dy.new_zeros(len(dy), plan.shape[1]) if dx is None else dx


def nf4_linear(  # noqa: PLR0913  # lora_linear's, and the size of a tile
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

    Without A and B it is the product alone. `tile_rows` rows of the weight are widened at a time (None: a megabyte's
    worth of numbers). Dropout is `lora_linear`'s.
    """
    kept = None
    if dropout > 0 and lora_a is not None:
        kept, chance = draw_kept(x, dropout, generator)
        scale = scale / chance
    plan = _Plan(scale, compute_dtype or x.dtype, tile_rows, weight.shape, type(weight))
    apply: Callable[..., Tensor] = Nf4LinearFunction.apply
    return apply(x, lora_a, lora_b, kept, plan, *weight.tensors())
