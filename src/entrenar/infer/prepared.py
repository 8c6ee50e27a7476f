"""Make a model with quantized weights ready to write text: each weight is widened once, not for each token.

A token's cost is that of reading every weight. Read from NF4, each one is widened first, which costs twenty times the
product with a single row. So before a text is written, each quantized projection, its adapter added, becomes one
matrix that multiplies as it stands:

    rows     form                              read for a token   what it changes
    1 to 4   int8, a scale for each output     1 byte a weight    weights move by at most 1/254 of their row's largest
    more     bfloat16 where the processor      2 bytes            weights keep 8 bits of their mantissa
             multiplies it, else float32       4 bytes            nothing

The activations are bfloat16 in the first two. The choice depends on the number of rows and on the processor alone, so
the same seed writes the same text. Where memory does not suffice, or `decode = "exact"` asks for it, the weights are
read as they are. The prompt is always read with the weights as they are: there a widened tile serves many tokens.

The forms live as long as the model and its weights stay as they are; a model that is being trained is prepared for
each text, and nothing remains.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast
from weakref import ReferenceType, WeakKeyDictionary

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from entrenar import ops
from entrenar.memory import free_bytes
from entrenar.model import Llama
from entrenar.peft import LoraLinear, QuantizedLinear
from entrenar.train.pieces import has_pieces

_log = logging.getLogger(__name__)
_MOST_ROWS_INT8 = 4  # beyond, torch's int8 kernel is slower than a bfloat16 product (benchmarks/decode_quantized.py)
_LEAST_TOKENS = 4  # preparing costs about what two tokens cost
_SPARE = 0.8  # of the memory that is free
_LEVELS = 127
_INT8_WIDTH = 64
_BLOCK_ROWS = 1024


class Form(Protocol):
    """A matrix that multiplies as it stands."""

    def __call__(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """Multiply each token by the weight."""


@dataclass(frozen=True, eq=False)
class Int8Rows:
    """A weight as 8-bit codes with a scale for each output: w ≈ codes · scale."""

    codes: Int8[Tensor, "O I"]
    scales: Float[Tensor, " O"]
    ones: Float[Tensor, " O"]

    def __call__(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """Multiply in bfloat16, and scale in float32: scales of 8 bits would move whole rows."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        y = torch._weight_int8pack_mm(rows, self.codes, self.ones).float() * self.scales
        return y.to(x.dtype).view(*x.shape[:-1], len(self.codes))


@dataclass(frozen=True, eq=False)
class Dense:
    """A widened weight."""

    weight: Float[Tensor, "O I"]

    def __call__(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """Multiply in the weight's dtype."""
        return torch.nn.functional.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)


def int8_rows(weight: Float[Tensor, "O I"]) -> Int8Rows:
    """Round each row to 255 even levels up to its largest magnitude."""
    scales = weight.abs().amax(1).float().clamp_min(torch.finfo(torch.float32).tiny) / _LEVELS
    codes = torch.empty(weight.shape, dtype=torch.int8)
    for start in range(0, len(weight), _BLOCK_ROWS):
        rows = slice(start, start + _BLOCK_ROWS)
        codes[rows] = (weight[rows] / scales[rows, None]).round_().clamp_(-_LEVELS, _LEVELS)
    return Int8Rows(codes, scales, torch.ones(len(weight), dtype=torch.bfloat16))


@dataclass(frozen=True)
class _Choice:
    """How to make a weight's form, and the bytes that it takes for each number."""

    make: Callable[[Tensor], Form]
    size_bytes: int


def choose(rows: int, width: int) -> _Choice:
    """Return the form that decodes `rows` rows fastest on this processor; `width` numbers are in a row of the weight.

    The int8 kernel reads past the end of rows that are no multiple of 16 wide (torch 2.13), so such weights are dense.
    """
    if rows <= _MOST_ROWS_INT8 and width % _INT8_WIDTH == 0 and _has_int8_kernel():
        return _Choice(int8_rows, 1)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return _Choice(lambda weight: Dense(weight.to(torch.bfloat16)), 2)
    return _Choice(Dense, 4)


@functools.cache
def _say_once(why: str) -> None:
    _log.warning("%s: text from quantized weights comes more slowly", why)


@functools.cache
def _has_int8_kernel() -> bool:
    """Return whether torch's private kernel is there and multiplies as expected; say so once if it does not."""
    codes = torch.arange(-32, 32, dtype=torch.int8).repeat(32, 1)
    x, ones = torch.ones(1, _INT8_WIDTH, dtype=torch.bfloat16), torch.ones(32, dtype=torch.bfloat16)
    try:
        if torch._weight_int8pack_mm(x, codes, ones).tolist() == [[-32.0] * 32]:
            return True
    except (AttributeError, RuntimeError, TypeError):
        pass
    _say_once("this torch has no 8-bit product that works")
    return False


@dataclass(frozen=True, eq=False)
class _Forms:
    """The forms of a model: of its projections by their modules' names, and of a quantized head."""

    of_modules: Mapping[str, Form]
    head: Form | None
    rows: int
    made_of: tuple[tuple[ReferenceType[Tensor], int], ...]
    adapters: tuple[str | None, ...]

    def are_of(self, model: Llama) -> bool:
        """Return whether the model still has the tensors that the forms were made of, and uses the same adapters."""
        if self.adapters != _adapters(model):
            return False
        now = list(_tensors(model))
        pairs = zip(self.made_of, now, strict=False)
        return len(now) == len(self.made_of) and all(
            reference() is one and version == _version(one) for (reference, version), one in pairs
        )


_NOTHING = _Forms({}, None, 0, (), ())
_KNOWN: WeakKeyDictionary[Llama, _Forms] = WeakKeyDictionary()


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to write; `head` is the form of a quantized head, None for a plain one."""

    forms: Mapping[nn.Module, Form]
    head: Form | None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let the projections multiply in their forms inside the block, and there alone."""
        for module, form in self.forms.items():
            module.__dict__["forward"] = form  # past torch's own __setattr__, which costs more than the rest
        try:
            yield
        finally:
            for module in self.forms:
                del module.__dict__["forward"]


def prepare(model: Llama, rows: int, num_tokens: int) -> Prepared:
    """Return a model's quantized projections in the form that writes `num_tokens` tokens for `rows` texts fastest."""
    has_whole_weights = not has_pieces(model)
    forms = _forms(model, rows) if num_tokens >= _LEAST_TOKENS and has_whole_weights else _NOTHING
    modules = dict(model.named_modules()) if forms.of_modules else {}
    return Prepared({modules[name]: form for name, form in forms.of_modules.items()}, forms.head)


def _forms(model: Llama, rows: int) -> _Forms:
    """Return the forms to use now: those made before, new ones, or none."""
    held = dict(_quantized(model)) if model.device.type == "cpu" else {}
    head = model.head_weight
    quantized_head = None if isinstance(head, Tensor) or model.device.type != "cpu" else head
    shapes = [_shape(one) for one in held.values()] + [one.shape for one in (quantized_head,) if one is not None]
    if not shapes:
        return _NOTHING
    is_trained = any(parameter.requires_grad for parameter in model.parameters())
    known = None if is_trained else _KNOWN.get(model)
    if known is not None and (known.rows > _MOST_ROWS_INT8) == (rows > _MOST_ROWS_INT8) and known.are_of(model):
        return known
    _KNOWN.pop(model, None)
    sizes = [choose(rows, shape[1]).size_bytes * math.prod(shape) for shape in shapes]
    needed = sum(sizes) + 8 * max(map(math.prod, shapes))
    if needed > _SPARE * (free := free_bytes()):
        _say_once(f"{needed / 1e9:.1f} GB to prepare the weights are not there ({free / 1e9:.1f} GB are free)")
        return _NOTHING
    with torch.inference_mode():
        forms = _Forms(
            {name: _made(_wide(module), rows) for name, module in held.items()},
            None if quantized_head is None else _made(quantized_head.dequantize(), rows),
            rows,
            tuple((ReferenceType(one), _version(one)) for one in _tensors(model)),
            _adapters(model),
        )
    if not is_trained:
        _KNOWN[model] = forms
    return forms


def _made(weight: Float[Tensor, "O I"], rows: int) -> Form:
    return choose(rows, weight.shape[1]).make(weight)


def _quantized(model: Llama) -> Iterator[tuple[str, LoraLinear | QuantizedLinear]]:
    """Yield the projections of the layers that hold a quantized weight, an adapted one as a whole."""
    inside: set[str] = set()
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, LoraLinear):
            inside.add(f"{name}.base_layer")
            if not isinstance(module.weight, Tensor):
                yield name, module
        elif isinstance(module, QuantizedLinear) and module.quantized is not None and name not in inside:
            yield name, module


def _wide(module: LoraLinear | QuantizedLinear) -> Float[Tensor, "O I"]:
    """Return a projection's one matrix in float32, its active adapter added."""
    if isinstance(module, LoraLinear) and module.active is not None:
        return module.adapter(module.active).merged(module.weight, torch.float32)
    weight = module.weight if isinstance(module, LoraLinear) else module.quantized
    return cast(ops.QuantizedWeight, weight).dequantize()


def _shape(module: LoraLinear | QuantizedLinear) -> tuple[int, ...]:
    return tuple(cast(Any, module.weight if isinstance(module, LoraLinear) else module.quantized).shape)


def _adapters(model: Llama) -> tuple[str | None, ...]:
    """Return the adapter in use of each adapted projection."""
    return tuple(module.active for module in model.modules() if isinstance(module, LoraLinear))


def _tensors(model: Llama) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
