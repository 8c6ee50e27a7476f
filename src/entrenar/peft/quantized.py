"""The modules that hold a frozen weight in few bits (QLoRA: Dettmers et al. 2023, arXiv:2305.14314).

Quantization covers the projections of the layers, which multiply every token; norms are small and stay as they are.
So do embedding and head, unless the config asks for them or the whole model has a budget of bits. An adapter learns on
top of a quantized projection as it does on a plain one, in float32, and corrects the quantized base.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Self, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding

from entrenar import ops

BaseWeight = Float[Tensor, "O I"] | ops.QuantizedWeight


class QuantizedLinear(nn.Module):
    """A frozen projection whose weight is quantized, in any kind.

    Its codes and scales are buffers, under the names that the weight's `tensors` gives them.

    Attributes:
        shape: (O, I).
        dtype: the dtype that the weight is widened to when a plain weight is wanted.
        weight: the plain weight that replaced the quantized one when an adapter was merged or the model widened.
        compute_dtype: the dtype of the product; None for the dtype of the activations.
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
        """The quantized weight; None while a plain one has replaced it."""
        if self._make is None:
            return None
        return self._make(*(getattr(self, name) for name in self._parts), self.shape)

    def hold(self, weight: BaseWeight) -> None:
        """Hold another weight, plain or quantized, from now on."""
        self._buffers.clear()
        self._parts: tuple[str, ...] = ()
        self._make: Callable[..., ops.QuantizedWeight] | None = None
        if isinstance(weight, Tensor):
            self.weight = nn.Parameter(weight, requires_grad=False)
            return
        self.weight, self._make = None, type(weight)
        self._parts = tuple(weight.tensors())
        for name, tensor in weight.tensors().items():
            self.register_buffer(name, tensor)

    def hold_as_parameters(self) -> None:
        """Hold codes and scales as frozen parameters, which FSDP cuts over ranks as it cuts no buffer."""
        for name, tensor in list(self._buffers.items()):
            if tensor is not None and tensor.ndim:
                del self._buffers[name]
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """Multiply each token by the weight."""
        if self.weight is not None:
            return ops.linear(x, self.weight, self.compute_dtype)
        return ops.quantized_linear(x, cast(ops.QuantizedWeight, self.quantized), compute_dtype=self.compute_dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002 - torch's
        """Move to another device, but keep the dtypes of codes and scales: rounded scales would be another weight."""
        scales = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own
        for name, buffer in scales.items():
            self._buffers[name] = buffer.to(cast(Tensor, self._buffers[name]).device)
        return self


class QuantizedEmbedding(nn.Module):
    """A quantized embedding; only the rows that are looked up are widened."""

    def __init__(self, weight: ops.QuantizedWeight, dtype: torch.dtype) -> None:
        super().__init__()
        self.table = QuantizedLinear(weight, dtype)

    @property
    def quantized(self) -> ops.QuantizedWeight | None:
        """The quantized weight, also read by a tied head; None while a plain one has replaced it."""
        return self.table.quantized

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the rows that are looked up."""
        return self.table.dtype if self.table.weight is None else self.table.weight.dtype

    def forward(self, ids: Int[Tensor, "..."]) -> Float[Tensor, "... D"]:
        """Look the ids up."""
        held = self.quantized
        if held is None:
            return embedding(ids, cast(Tensor, self.table.weight))
        return ops.quantized_embedding(ids, held, self.table.dtype)


def weight_of(module: nn.Module) -> BaseWeight | None:
    """Return the weight of a projection, adapted or not, plain or quantized; None for a module without one."""
    held = getattr(module, "base_layer", module)
    if isinstance(held, QuantizedLinear) and held.quantized is not None:
        return held.quantized
    weight = getattr(held, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def widened(weight: BaseWeight, dtype: torch.dtype, rows: slice | None = None) -> Float[Tensor, "rows I"]:
    """Return some rows of a weight in a floating-point dtype."""
    if isinstance(weight, Tensor):
        return weight[rows or slice(None)].to(dtype)
    return weight.dequantize(dtype, rows)


def quantized_projections(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Yield name and module of each quantized projection; an embedding counts as one."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and module.quantized is not None:
            yield name, module


def quantized_weights(model: nn.Module) -> dict[str, ops.QuantizedWeight]:
    """Return the quantized weights of a model by the names that their plain weights have."""
    return {
        f"{name.removesuffix('.table')}.weight": cast(ops.QuantizedWeight, module.quantized)
        for name, module in quantized_projections(model)
    }


def put_quantized(model: nn.Module, name: str, weight: ops.QuantizedWeight, dtype: torch.dtype) -> None:
    """Replace the projection or embedding `name` by one that holds a quantized weight."""
    parent, _, own = name.rpartition(".")
    holder = model.get_submodule(parent)
    old = holder.get_submodule(own)
    if isinstance(old, nn.Embedding):
        setattr(holder, own, QuantizedEmbedding(weight, dtype))
        return
    projection = QuantizedLinear(weight, dtype)
    projection.compute_dtype = cast(Any, old).compute_dtype
    setattr(holder, own, projection)


def memory_lines(model: nn.Module) -> Iterator[str]:
    """Describe the quantized size of a model, if it has quantized weights."""
    held = list(quantized_weights(model).values())
    if held:
        kept = sum(parameter.nbytes for parameter in model.parameters())
        numbers = sum(math.prod(weight.shape) for weight in held)
        size_bytes = sum(ops.stored_bytes(weight) for weight in held)
        kinds = {f"{weight.kind} ({weight.bits} bits)" for weight in held}
        yield (
            f"base: {numbers:,} weights in {len(held)} matrices of {', '.join(sorted(kinds))}, "
            f"{size_bytes / 1e6:,.1f} MB ({8 * size_bytes / numbers:.3f} bits each); "
            f"the rest {kept / 1e6:,.1f} MB as stored"
        )


def widen(model: nn.Module) -> None:
    """Hold every matrix as a plain weight again, in the dtype that it stands for."""
    for _, module in list(quantized_projections(model)):
        module.hold(widened(cast(ops.QuantizedWeight, module.quantized), module.dtype))
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedEmbedding):
            parent, _, own = name.rpartition(".")
            plain = nn.Embedding.from_pretrained(cast(Tensor, module.table.weight))  # type: ignore[no-untyped-call]
            setattr(model.get_submodule(parent), own, plain)
