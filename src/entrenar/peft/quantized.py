"""Frozen weights held in a few bits (QLoRA: Dettmers et al. 2023, arXiv:2305.14314).

NF4 quantizes what is multiplied by every token, the projections of the layers; norms are small and stay as they are.
So do embedding and head unless they are asked for (`quantize`) or have a part in a budget of bits (`bit_budget`). An
adapter learns beside a quantized projection just as it does beside a plain one, in float32; what it corrects is then
the base as quantized, not as it was.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, Self, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding

from entrenar import ops

BaseWeight = Float[Tensor, "O I"] | ops.QuantizedWeight


class Nf4Linear(nn.Module):
    """A frozen projection whose weight is held in four bits, or in some other few.

    Its codes and scales are buffers, by the names that `ops.QuantizedWeight` has for them.

    Attributes:
        shape: (O, I).
        dtype: what the weight stands for: the dtype that it is widened to when a plain weight is wanted.
        weight: the plain weight in its place once an adapter was merged or the model widened; else None.
        compute_dtype: what the product is computed in; None for the dtype of the activations.
    """

    weight: nn.Parameter | None

    def __init__(self, weight: ops.QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = weight.shape, dtype
        self.compute_dtype: torch.dtype | None = None
        self.register_parameter("weight", None)
        self.hold(weight)

    @property
    def quantized(self) -> ops.QuantizedWeight | None:
        """The weight in a few bits; None while a plain one is in its place."""
        if self._kind is None:
            return None
        return self._kind(*self._buffers.values(), self.shape)

    def hold(self, weight: BaseWeight) -> None:
        """Put a weight in the place of the one that is held, plain or in a few bits."""
        self._buffers.clear()
        self._kind: Callable[..., ops.QuantizedWeight] | None = None
        if isinstance(weight, Tensor):
            self.weight = nn.Parameter(weight, requires_grad=False)
            return
        self.weight, self._kind = None, type(weight)
        names = (field.name for field in fields(weight) if field.name != "shape")
        for name, tensor in zip(names, weight.tensors(), strict=True):
            self.register_buffer(name, tensor)

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """Multiply each token by the weight."""
        if self.weight is not None:
            return ops.linear(x, self.weight, self.compute_dtype)
        return ops.nf4_linear(x, cast(ops.QuantizedWeight, self.quantized), compute_dtype=self.compute_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 - torch's
        """Move to another device, but keep the dtypes of codes and scales: rounded scales would be another weight."""
        scales = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        for name, buffer in scales.items():
            self._buffers[name] = buffer.to(cast(Tensor, self._buffers[name]).device)
        return self


class QuantizedEmbedding(nn.Module):
    """An embedding held in a few bits; only the rows that are looked up are widened."""

    def __init__(self, weight: ops.QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = Nf4Linear(weight, dtype)

    @property
    def quantized(self) -> ops.QuantizedWeight | None:
        """The weight in a few bits, which a tied head reads; None while a plain one is in its place."""
        return self.table.quantized

    def forward(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        """Look the ids up."""
        held = self.quantized
        if held is None:
            return embedding(ids, cast(Tensor, self.table.weight))
        return ops.quantized_embedding(ids, held, self.table.dtype)


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
    return ops.dequantize(weight, dtype, rows)


def quantized_projections(model: nn.Module) -> Iterator[tuple[str, Nf4Linear]]:
    """Yield name and module of each projection that is held in a few bits; an embedding counts as one."""
    for name, module in model.named_modules():
        if isinstance(module, Nf4Linear) and module.quantized is not None:
            yield name, module


def put_quantized(model: nn.Module, name: str, weight: ops.QuantizedWeight, dtype: torch.dtype) -> None:
    """Put a weight in a few bits in the place of the projection or embedding `name`."""
    parent, _, own = name.rpartition(".")
    holder = model.get_submodule(parent)
    old = holder.get_submodule(own)
    if isinstance(old, nn.Embedding):
        setattr(holder, own, QuantizedEmbedding(weight, dtype))
        return
    projection = Nf4Linear(weight, dtype)
    projection.compute_dtype = cast(Any, old).compute_dtype
    setattr(holder, own, projection)


def memory_lines(model: nn.Module) -> Iterator[str]:
    """Say what few bits leave of the weights, where there are any."""
    held = [cast(ops.QuantizedWeight, module.quantized) for _, module in quantized_projections(model)]
    if held:
        kept = sum(parameter.nbytes for parameter in model.parameters())
        numbers = sum(math.prod(weight.shape) for weight in held)
        size_bytes = sum(weight.size_bytes for weight in held)
        widths = {_kind(weight) for weight in held}
        yield (
            f"base: {numbers:,} weights of {len(held)} matrices in {', '.join(sorted(widths))}, "
            f"{size_bytes / 1e6:,.1f} MB ({8 * size_bytes / numbers:.3f} bits each); "
            f"the rest {kept / 1e6:,.1f} MB as stored"
        )


def _kind(weight: ops.QuantizedWeight) -> str:
    if isinstance(weight, ops.NfBitsWeight):
        return f"{weight.bits} bits"
    return "NF4" if isinstance(weight, ops.Nf4Weight) else "int8"


def widen(model: nn.Module) -> None:
    """Hold every matrix as a plain weight again, of the dtype it stands for."""
    for _, module in list(quantized_projections(model)):
        module.hold(widened(cast(ops.QuantizedWeight, module.quantized), module.dtype))
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedEmbedding):
            parent, _, own = name.rpartition(".")
            plain = nn.Embedding.from_pretrained(cast(Tensor, module.table.weight))  # type: ignore[no-untyped-call]
            setattr(model.get_submodule(parent), own, plain)
