"""The product with a weight matrix, in the precision that this machine multiplies fastest.

bfloat16 halves the memory of weights and activations, but not every processor multiplies it faster: without matrix
units, some run their bfloat16 dot product at half the rate of float32. What is stored and what is multiplied are
therefore two settings. With `compute_dtype` wider than the stored type, each operand is widened just before its
product and the result is rounded once, so nothing wide outlives the call.

    y = x Wᵀ                                           (1)
    dx = dy W                                          (2)
    dW = dyᵀ x                                         (3)

Saved: W, and x if W is trained, both as they are stored. `fastest_compute_dtype` measures which type to take.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from entrenar.ops.first_order import refuse_double_backward

_PROBE_ROWS = 1024
_PROBE_REPEATS = 9
# Widening the operands and rounding the result costs a few per cent of a product: float32 must win by more than that.
_LEAST_GAIN = 1.1


def reference_linear(
    x: Float[Tensor, "... I"], weight: Float[Tensor, "O I"], compute_dtype: torch.dtype | None = None
) -> Float[Tensor, "... O"]:
    """Return x Wᵀ, in plain torch with autograd."""
    wide = compute_dtype or x.dtype
    return (x.to(wide) @ weight.to(wide).mT).to(x.dtype)


def linear_forward(x: Tensor, weight: Tensor) -> Tensor:
    """Return y of equation (1)."""
    return x @ weight.mT  # (N, I) @ (I, O)  (1)


def linear_backward_input(dy: Tensor, weight: Tensor) -> Tensor:
    """Return dx of equation (2)."""
    return dy @ weight  # (N, O) @ (O, I)  (2)


def linear_backward_weight(dy: Tensor, x: Tensor) -> Tensor:
    """Return dW of equation (3)."""
    return dy.mT @ x  # (O, N) @ (N, I)  (3)


class LinearFunction(torch.autograd.Function):
    """`linear_forward` and its two backward products on the tape, in `compute_dtype`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, compute_dtype: torch.dtype) -> Tensor:
        """Compute the output and save what the backward needs."""
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.compute_dtype = compute_dtype
        rows = x.reshape(-1, x.shape[-1])  # (N, I)
        y = linear_forward(rows.to(compute_dtype), weight.to(compute_dtype))
        return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Compute the gradients that are wanted."""
        refuse_double_backward("linear")
        x, weight = ctx.saved_tensors
        wide_dy = dy.reshape(-1, dy.shape[-1]).to(ctx.compute_dtype)  # (N, O)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx = linear_backward_input(wide_dy, weight.to(ctx.compute_dtype)).to(dy.dtype)
            dx = dx.view(*dy.shape[:-1], weight.shape[1])
        if ctx.needs_input_grad[1]:
            wide_x = x.reshape(-1, x.shape[-1]).to(ctx.compute_dtype)  # (N, I)
            dweight = linear_backward_weight(wide_dy, wide_x).to(weight.dtype)
        return dx, dweight, None


def linear(
    x: Float[Tensor, "... I"], weight: Float[Tensor, "O I"], compute_dtype: torch.dtype | None = None
) -> Float[Tensor, "... O"]:
    """Return x Wᵀ in x's dtype, multiplied in `compute_dtype`; None means in the dtype that is stored."""
    if compute_dtype is None or compute_dtype == x.dtype:
        return torch.nn.functional.linear(x, weight)
    apply: Callable[..., Tensor] = LinearFunction.apply
    return apply(x, weight, compute_dtype)


def fastest_compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Measure which dtype multiplies matrices stored as `stored` fastest on `device`: itself or float32.

    Times products of a typical size in turns and compares the least times, which other work on the machine disturbs
    least; takes a fraction of a second. Only reduced precision on a CPU is measured; else the stored type is taken.
    """
    if device.type != "cpu" or stored not in (torch.bfloat16, torch.float16):
        return stored
    operands = {
        dtype: torch.ones(_PROBE_ROWS, _PROBE_ROWS, dtype=dtype, device=device) for dtype in (stored, torch.float32)
    }
    elapsed_s: dict[torch.dtype, list[float]] = {dtype: [] for dtype in operands}
    for repeat in range(_PROBE_REPEATS + 1):
        for dtype, matrix in operands.items():
            started = time.perf_counter()
            linear_forward(matrix, matrix)
            if repeat > 0:  # the first product of each dtype prepares its kernel
                elapsed_s[dtype].append(time.perf_counter() - started)
    gain = min(elapsed_s[stored]) / min(elapsed_s[torch.float32])
    return torch.float32 if gain > _LEAST_GAIN else stored
