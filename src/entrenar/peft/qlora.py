"""Frozen projections held in four bits (QLoRA: Dettmers et al. 2023, arXiv:2305.14314).

Only what is multiplied by every token is quantized: the projections of the layers. Norms are small, and embedding and
head decide single tokens, so they stay as they are stored. An adapter learns beside a quantized projection just as it
does beside a plain one, in float32; what it corrects is then the base as quantized, not as it was.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Self, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from entrenar import ops

BaseWeight = Float[Tensor, "O I"] | ops.Nf4Weight


class Nf4Linear(nn.Module):
    """A frozen projection whose weight is held in four bits.

    Attributes:
        shape: (O, I).
        dtype: what the weight stands for: the dtype that it is widened to when a plain weight is wanted.
        weight: the plain weight in its place once an adapter was merged or the model widened; else None.
        compute_dtype: what the product is computed in; None for the dtype of the activations.
    """

    codes: Tensor | None
    absmax: Tensor | None
    nested_absmax: Tensor | None
    offset: Tensor | None
    weight: nn.Parameter | None

    def __init__(self, weight: ops.Nf4Weight, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = weight.shape, dtype
        self.compute_dtype: torch.dtype | None = None
        self.register_parameter("weight", None)
        for name in ("codes", "absmax", "nested_absmax", "offset"):
            self.register_buffer(name, None)
        self.hold(weight)

    @property
    def quantized(self) -> ops.Nf4Weight | None:
        """The weight in four bits; None while a plain one is in its place."""
        if self.codes is None or self.absmax is None:
            return None
        return ops.Nf4Weight(self.codes, self.absmax, self.nested_absmax, self.offset, self.shape)

    def hold(self, weight: Tensor | ops.Nf4Weight) -> None:
        """Put a weight in the place of the one that is held, plain or in four bits."""
        if isinstance(weight, Tensor):
            self.weight = nn.Parameter(weight, requires_grad=False)
            self.codes = self.absmax = self.nested_absmax = self.offset = None
        else:
            self.weight = None
            self.codes, self.absmax, self.nested_absmax, self.offset = weight.tensors()

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """Multiply each token by the weight."""
        if self.weight is not None:
            return ops.linear(x, self.weight, self.compute_dtype)
        return ops.nf4_linear(x, cast(ops.Nf4Weight, self.quantized), compute_dtype=self.compute_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 - torch's
        """Move to another device, but keep the dtypes of codes and scales: rounded scales would be another weight."""
        scales = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        for name, buffer in scales.items():
            self._buffers[name] = buffer.to(cast(Tensor, self._buffers[name]).device)
        return self


def weight_of(module: nn.Module) -> BaseWeight | None:
    """Return the weight of a projection, adapted or not, as it is held; None for what has no weight."""
    held = getattr(module, "base_layer", module)
    if isinstance(held, Nf4Linear) and held.quantized is not None:
        return held.quantized
    weight = getattr(held, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def widened(weight: BaseWeight, dtype: torch.dtype, rows: slice | None = None) -> Float[Tensor, "rows I"]:
    """Return some rows of a weight in a floating-point dtype."""
    if isinstance(weight, Tensor):
        return weight[rows or slice(None)].to(dtype)
    return ops.dequantize_nf4(weight, dtype, rows)


def quantized_projections(model: nn.Module) -> Iterator[tuple[str, Nf4Linear]]:
    """Yield name and module of each projection that is held in four bits."""
    for name, module in model.named_modules():
        if isinstance(module, Nf4Linear) and module.quantized is not None:
            yield name, module


def put_quantized(model: nn.Module, name: str, weight: ops.Nf4Weight, dtype: torch.dtype) -> None:
    """Put a weight in four bits in the place of the projection `name`."""
    parent, _, own = name.rpartition(".")
    holder = model.get_submodule(parent)
    projection = Nf4Linear(weight, dtype)
    projection.compute_dtype = cast(Any, holder.get_submodule(own)).compute_dtype
    setattr(holder, own, projection)


def memory_lines(model: nn.Module) -> Iterator[str]:
    """Say what four bits leave of the weights, where there are any."""
    held = [cast(ops.Nf4Weight, module.quantized) for _, module in quantized_projections(model)]
    if held:
        kept = sum(parameter.nbytes for parameter in model.parameters())
        numbers = sum(math.prod(weight.shape) for weight in held)
        size_bytes = sum(weight.size_bytes for weight in held)
        yield (
            f"base: {numbers:,} weights of {len(held)} projections in NF4, {size_bytes / 1e6:,.1f} MB "
            f"({8 * size_bytes / numbers:.3f} bits each); the rest {kept / 1e6:,.1f} MB as stored"
        )


def widen(model: nn.Module) -> None:
    """Hold every projection as a plain weight again, of the dtype it stands for."""
    for _, module in list(quantized_projections(model)):
        module.hold(widened(cast(ops.Nf4Weight, module.quantized), module.dtype))
