"""Predict an operation's result from the shapes of its arguments: tensors without bytes, on torch's meta device.

torch has such rules itself, but those of this version are Python and cost 0.1 to 1 ms a call, and the first of them
loads the symbolic algebra for 2 s. A training step makes tens of thousands of calls of few operations, so those have
their rule here. A test holds each rule to the shape, stride and dtype of torch's kernel; every other operation is left
to torch. An operation that writes into its arguments returns them; there is nothing to compute.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_BOOLEAN = {"eq", "ne", "lt", "le", "gt", "ge", "logical_not", "logical_and", "logical_or", "isfinite"}
_ELEMENTWISE = _BOOLEAN | {
    "add", "sub", "mul", "div", "pow", "neg", "rsqrt", "sqrt", "exp", "log", "silu", "sigmoid", "reciprocal", "abs",
    "cos", "sin", "silu_backward", "where", "maximum", "minimum", "clamp", "clamp_min", "bitwise_and", "bitwise_or",
    "bitwise_not", "bitwise_right_shift", "bitwise_left_shift", "round", "floor", "masked_fill", "rsub",
    "floor_divide", "remainder",
}  # fmt: skip
_REDUCTIONS = {"sum", "mean", "amax", "amin", "linalg_vector_norm", "all", "any"}
_LIKE = {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like"}
_NEW = {"new_empty", "new_zeros", "new_ones", "new_full"}


@functools.cache
def writes(func: Any) -> tuple[tuple[int, str], ...]:
    """Return position and name of the arguments that an operation writes into."""
    arguments = func._schema.arguments
    return tuple((at, a.name) for at, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)


@functools.cache
def rule_of(func: Any) -> Callable[..., Any] | None:
    """Return the rule that predicts an operation's result; None for an operation that is left to torch."""
    if writes(func):
        return functools.partial(_written, func)
    name = func._schema.name.removeprefix("aten::")
    if name in _ELEMENTWISE:
        return functools.partial(_elementwise, torch.bool if name in _BOOLEAN else None)
    if name in _REDUCTIONS:
        return functools.partial(_reduced, {a.name: at for at, a in enumerate(func._schema.arguments)})
    if name in _LIKE:
        return _like
    if name in _NEW:
        return _new
    return _RULES.get(name)


@dataclass(frozen=True, slots=True)
class TensorShape:
    """A dense tensor to be made; `order` lists its dimensions in memory, outermost first."""

    size: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...] | None = None

    @property
    def size_bytes(self) -> int:
        """The bytes that the tensor would take."""
        return math.prod(self.size) * self.dtype.itemsize

    def make(self) -> Tensor:
        """Return the tensor without its bytes."""
        if self.order is None:
            return torch.empty(self.size, dtype=self.dtype, device="meta")
        stride, step = [0] * len(self.size), 1
        for at in reversed(self.order):
            stride[at] = step
            step *= max(self.size[at], 1)
        return torch.empty_strided(self.size, stride, dtype=self.dtype, device="meta")


def _order_of(x: Tensor) -> tuple[int, ...] | None:
    """Return the order of x's dimensions in memory if x fills its memory without gaps, else None."""
    if x.is_contiguous():
        return None
    strides = x.stride()
    order = sorted(range(x.ndim), key=lambda at: (-strides[at], at))
    expected = 1
    for at in reversed(order):
        if x.shape[at] != 1 and strides[at] != expected:
            return None
        expected *= x.shape[at]
    return tuple(order)


def _written(func: Any, *args: Any, **kwargs: Any) -> Any:
    results = [args[at] if at < len(args) else kwargs.get(name) for at, name in writes(func)]
    count = len(func._schema.returns)
    return None if count == 0 else results[0] if count == 1 else tuple(results[:count])


def _elementwise(dtype: torch.dtype | None, *args: Any, **_: Any) -> TensorShape:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    shape = functools.reduce(_broadcast, (tuple(t.shape) for t in tensors))
    if dtype is None:
        dtype = _promoted(args)
    layout = next((t for t in tensors if tuple(t.shape) == shape and shape), None)
    return TensorShape(tuple(shape), dtype, None if layout is None else _order_of(layout))


def _broadcast(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of two shapes together; torch's own function loads the symbolic algebra."""
    if one == other:
        return tuple(one)
    short, long = sorted((tuple(one), tuple(other)), key=len)
    short = (1,) * (len(long) - len(short)) + short
    return tuple(b if a == 1 else a for a, b in zip(short, long, strict=True))


def _promoted(args: Sequence[Any]) -> torch.dtype:
    operands = [arg for arg in args if isinstance(arg, Tensor) and arg.dtype != torch.bool] or [
        arg for arg in args if isinstance(arg, Tensor)
    ]
    wide = [t for t in operands if t.ndim] or operands
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in wide))
    if not dtype.is_floating_point and any(isinstance(arg, float) for arg in args):
        return torch.get_default_dtype()
    return dtype


def _reduced(places: dict[str, int], *args: Any, **kwargs: Any) -> TensorShape:
    def value(name: str, default: Any) -> Any:
        place = places.get(name, len(args))
        return args[place] if place < len(args) else kwargs.get(name, default)

    x: Tensor = args[0]
    dtype = value("dtype", None) or x.dtype
    dims = value("dim", None)
    kept = value("keepdim", None)
    reduced = {at % x.ndim for at in ([dims] if isinstance(dims, int) else dims)} if dims else set(range(x.ndim))
    return TensorShape(
        tuple(1 if at in reduced else n for at, n in enumerate(x.shape) if kept or at not in reduced), dtype
    )


def _like(x: Tensor, *_: Any, dtype: torch.dtype | None = None, memory_format: Any = None, **__: Any) -> TensorShape:
    order = None if memory_format == torch.contiguous_format else _order_of(x)
    return TensorShape(tuple(x.shape), dtype or x.dtype, order)


def _made(size: Sequence[int], *_: Any, dtype: torch.dtype | None = None, **__: Any) -> TensorShape:
    return TensorShape(tuple(size), dtype or torch.get_default_dtype())


def _cloned(x: Tensor, *, memory_format: Any = None) -> TensorShape:
    return _like(x, memory_format=memory_format)


def _new(x: Tensor, size: Sequence[int], *_: Any, dtype: torch.dtype | None = None, **__: Any) -> TensorShape:
    return TensorShape(tuple(size), dtype or x.dtype)


def _mm(a: Tensor, b: Tensor) -> TensorShape:
    return TensorShape((a.shape[0], b.shape[1]), a.dtype)


def _bmm(a: Tensor, b: Tensor) -> TensorShape:
    return TensorShape((a.shape[0], a.shape[1], b.shape[2]), a.dtype)


def _addmm(_: Tensor, a: Tensor, b: Tensor, **__: Any) -> TensorShape:
    return _mm(a, b)


def _embedding(weight: Tensor, indices: Tensor, *_: Any) -> TensorShape:
    return TensorShape((*indices.shape, weight.shape[1]), weight.dtype)


def _embedding_backward(dy: Tensor, _: Tensor, num_weights: int, *__: Any) -> TensorShape:
    return TensorShape((num_weights, dy.shape[-1]), dy.dtype)


def _index_select(x: Tensor, dim: int, index: Tensor) -> TensorShape:
    shape = list(x.shape)
    shape[dim] = index.numel()
    return TensorShape(tuple(shape), x.dtype)


def _gather(x: Tensor, _: int, index: Tensor, **__: Any) -> TensorShape:
    return TensorShape(tuple(index.shape), x.dtype)


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> TensorShape:
    parts = [t for t in tensors if t.shape != (0,)]
    shape = list(parts[0].shape)
    shape[dim] = sum(t.shape[dim] for t in parts)
    return TensorShape(tuple(shape), functools.reduce(torch.promote_types, (t.dtype for t in parts)))


def _stack(tensors: Sequence[Tensor], dim: int = 0) -> TensorShape:
    shape = list(tensors[0].shape)
    shape.insert(dim % (len(shape) + 1), len(tensors))
    return TensorShape(tuple(shape), tensors[0].dtype)


def _flash(q: Tensor, _: Tensor, v: Tensor, *__: Any, **___: Any) -> tuple[TensorShape, TensorShape]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return _by_token((*q.shape[:3], v.shape[3]), q.dtype), TensorShape(tuple(q.shape[:3]), wide, (0, 2, 1))


def _flash_backward(_: Tensor, q: Tensor, k: Tensor, v: Tensor, *__: Any, **___: Any) -> tuple[TensorShape, ...]:
    return tuple(_by_token(t.shape, t.dtype) for t in (q, k, v))


def _by_token(size: Sequence[int], dtype: torch.dtype) -> TensorShape:
    """Return (B, H, T, K) as the kernel lays it out: the heads of a token side by side."""
    return TensorShape(tuple(size), dtype, (0, 2, 1, 3))


_RULES: dict[str, Callable[..., Any]] = {
    "empty": _made,
    "zeros": _made,
    "ones": _made,
    "clone": _cloned,
    "_to_copy": _like,
    "mm": _mm,
    "bmm": _bmm,
    "addmm": _addmm,
    "embedding": _embedding,
    "embedding_dense_backward": _embedding_backward,
    "index_select": _index_select,
    "gather": _gather,
    "cat": _cat,
    "stack": _stack,
    "_scaled_dot_product_flash_attention_for_cpu": _flash,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _flash_backward,
}
