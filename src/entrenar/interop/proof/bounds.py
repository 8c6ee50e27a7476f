"""Bound how much each written dtype may change a weight; written files are checked against these bounds.

They follow from the formats' definitions, not from the code that rounds: half a unit in the last place, half a step of
a block's scale, half a gap between two levels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from entrenar.interop import llama2c
from entrenar.interop.formats import Format
from entrenar.model import Llama, LlamaConfig
from entrenar.peft import QuantizeConfig, quantized_weights

# Two orders of multiplying level, scale and top.
_SAME_NUMBER = 1e-6
# The name of a weight and the weight give the largest error of each of its rows' numbers.
Bound = Callable[[str, Tensor], Callable[[slice], Tensor]]

_BLOCK = 32
_NF4_BLOCK, _NF4_GROUP = 64, 256
# Half the gap between -1 and the next level; half the gap between two numbers of a scale's top decade, and what
# finding the nearest one in 65,536 bins may miss.
_NF4_HALF_GAP, _SCALE_HALF_GAP = 0.1519036, 0.0070313 + 2.0**-16

_INT8_HALF_STEP = 0.5 / 127 * 1.0001


def bound_of(dtype: str, kind: Format, config: LlamaConfig, held: QuantizeConfig) -> Bound:
    """Return the bound of a format and dtype; `held` says what of nf4 is in few bits."""

    def by_rows(weight: Tensor, allowed: Callable[[Tensor], Tensor]) -> Callable[[slice], Tensor]:
        return lambda rows: allowed(weight[rows].float())

    def bound(name: str, weight: Tensor) -> Callable[[slice], Tensor]:
        few = held.kind_of(name) if kind == "nf4" else "keep"
        if few == "nf4":
            return _of_levels(weight)
        if few == "int8":
            return by_rows(weight, lambda rows: (rows.abs().amax(1, keepdim=True) * _INT8_HALF_STEP).expand_as(rows))
        if weight.ndim == 1 and kind in ("llama2c", "gguf"):
            return by_rows(weight, lambda rows: _of_numbers(rows, "f32"))
        if dtype not in ("q8_0", "q4_0"):
            return by_rows(weight, lambda rows: _of_numbers(rows, dtype))
        if kind == "gguf" and weight.shape[-1] % _BLOCK:
            return by_rows(weight, lambda rows: _of_numbers(rows, "f16"))
        size = llama2c.group_size_of(config) if kind == "llama2c" else _BLOCK
        return by_rows(weight, lambda rows: _of_steps(rows, size, dtype, has_half_scales=kind == "gguf"))

    return bound


def bound_of_rounded(model: Llama) -> Bound:
    """Return the bound of a file that holds a model's matrices as they are rounded: what the rounding did, no more."""
    held = quantized_weights(model)

    def bound(name: str, weight: Tensor) -> Callable[[slice], Tensor]:
        stored = held.get(name)
        if stored is None:
            return lambda rows: torch.zeros_like(weight[rows], dtype=torch.float32)

        def of_rows(rows: slice) -> Tensor:
            numbers = stored.dequantize(torch.float32, rows)
            return (numbers - weight[rows].float()).abs() + numbers.abs() * _SAME_NUMBER

        return of_rows

    return bound


def bound_of_widened(bound: Bound, dtype: torch.dtype) -> Bound:
    """Return the bound of a model whose quantized source was widened to `dtype` before it was written."""
    name_of = {torch.float16: "f16", torch.bfloat16: "bf16"}

    def wider(name: str, weight: Tensor) -> Callable[[slice], Tensor]:
        allowed = bound(name, weight)
        if weight.ndim == 1 or dtype not in name_of:
            return allowed
        return lambda rows: allowed(rows) + 1.01 * _of_numbers(weight[rows].float(), name_of[dtype])

    return wider


def _of_numbers(weight: Tensor, dtype: str) -> Tensor:
    # half a unit in the last place; below the smallest normal number the unit is fixed
    bits, smallest = {"f32": (24, 0.0), "f16": (11, 2.0**-25), "bf16": (8, 0.0)}[dtype]
    return torch.zeros_like(weight) if dtype == "f32" else weight.abs() * 2.0**-bits + smallest


def _of_steps(weight: Tensor, size: int, dtype: str, *, has_half_scales: bool) -> Tensor:
    largest = weight.reshape(-1, size).abs().amax(dim=1, keepdim=True)
    # Q8_0: half of 1/127; Q4_0: a step of 1/8, since its range ends at +7; the scale itself is a float16 in GGUF.
    step = 0.5 / 127 if dtype == "q8_0" else 1 / 8
    allowed = largest * (step + (2.0**-11 if has_half_scales else 0)) * 1.001 + 127 * 2.0**-25
    return allowed.expand(-1, size).reshape(weight.shape)


def _of_levels(weight: Tensor) -> Callable[[slice], Tensor]:
    """NF4: half a gap of the levels times a block's magnitude, and the error of that magnitude itself."""
    flat = weight.reshape(-1)
    parts = [_blocks(flat[start : start + 2**20], _NF4_BLOCK).amax(1) for start in range(0, len(flat), 2**20)]
    magnitudes = torch.cat(parts)
    spread = _blocks(magnitudes - magnitudes.mean(), _NF4_GROUP).amax(1)
    spread = spread.repeat_interleave(_NF4_GROUP)[: len(magnitudes)]
    allowed = (magnitudes * _NF4_HALF_GAP + spread * _SCALE_HALF_GAP) * 1.0001 + 1e-37
    width = weight.shape[1]

    def of_rows(rows: slice) -> Tensor:
        start, stop, _ = rows.indices(weight.shape[0])
        places = torch.arange(start * width, stop * width) // _NF4_BLOCK
        return allowed[places].view(-1, width)

    return of_rows


def _blocks(numbers: Tensor, size: int) -> Tensor:
    return torch.nn.functional.pad(numbers.float().abs(), (0, -len(numbers) % size)).view(-1, size)
