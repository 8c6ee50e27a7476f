"""A model without weights, and its weights without bytes: what the recipes load or make, by shape alone.

config -> modules on the meta device -> storage as the folder or the run holds it -> adapter
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from entrenar.config import AnyConfig, FinetuneConfig, RunConfig
from entrenar.interop import bits, bnb
from entrenar.interop.assemble import give_storage, set_parameter
from entrenar.interop.hf import open_folder
from entrenar.interop.safetensors_file import Entry
from entrenar.model import Llama
from entrenar.ops import Int8Weight, Nf4Weight, NfBitsWeight, QuantizedWeight
from entrenar.ops.quantized import bits as nf_bits
from entrenar.ops.quantized import nf4
from entrenar.ops.quantized.bits import WIDTHS
from entrenar.peft import from_base, put_quantized
from entrenar.peft.bit_budget import check_budget
from entrenar.planning.ledger import Ledger


@dataclass(frozen=True)
class Skeleton:
    """A model before it has weights, and where in a folder they will come from.

    Attributes:
        parts: of each weight, in the order in which they are read; an unquantized one has one part; empty for a new
            model.
    """

    model: Llama
    parts: Mapping[str, Mapping[str, Entry]]


def skeleton(config: AnyConfig, base: Path | None) -> Skeleton:
    """Return the model of a config as the run has it before there are weights; `base` is what is fine-tuned."""
    if isinstance(config, RunConfig):
        with torch.device("meta"):
            return Skeleton(Llama(config.model), {})
    model, places, _ = open_folder(base or config.model)
    parts = {name: {part: entry for part, (_, entry) in found.items()} for name, found in places.items()}
    return Skeleton(model, parts)


def give_shapes(config: AnyConfig, begun: Skeleton, ledger: Ledger) -> list[Tensor]:
    """Give a model its weights without their bytes, as the run does; return those that stay in a mapped file."""
    if isinstance(config, RunConfig):
        give_storage(begun.model, torch.device("cpu"))
        begun.model.init_weights(torch.Generator())
        return []
    mapped = _load_shapes(config, begun, ledger)
    if config.method != "full":
        from_base(begun.model, config.lora, torch.Generator())
    return mapped


def _load_shapes(config: FinetuneConfig, begun: Skeleton, ledger: Ledger) -> list[Tensor]:
    plain = [parts[""].dtype for parts in begun.parts.values() if len(parts) == 1]
    dtype = config.stored_dtype or functools.reduce(torch.promote_types, plain)
    model = begun.model
    config.quantize.check_tied(is_tied=model.config.tie_word_embeddings)
    if config.quantize.bits is not None and len(plain) == len(begun.parts):
        check_budget(model, config.quantize.bits, dtype)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    mapped: list[Tensor] = []

    def empty(shape: Sequence[int], stored: torch.dtype, *, is_mapped: bool) -> Tensor:
        with ledger.mapped() if is_mapped else nullcontext():
            tensor = torch.empty(tuple(shape), dtype=stored, device="meta")
        mapped.extend([tensor] if is_mapped else [])
        return tensor

    for name, parts in begun.parts.items():
        if name not in shapes:  # a head that is the embedding
            continue
        is_packed = len(parts) > 1
        kind = _kind_in_folder(parts) if is_packed else _kind_in_run(config, name)
        if kind == "keep":
            is_mapped = parts[""].dtype == dtype
            set_parameter(model, name, empty(shapes[name], dtype, is_mapped=is_mapped))
        else:
            shape = shapes[name][0], shapes[name][1]
            weight = _quantized(kind, shape, functools.partial(empty, is_mapped=is_packed))
            put_quantized(model, name.removesuffix(".weight"), weight, dtype)
    return mapped


def _kind_in_folder(parts: Mapping[str, Entry]) -> str:
    """Return how a folder stores a weight: nf4, int8, or a number of bits."""
    if bits.PARTS[0] in parts:
        return str(parts[""].shape[1])
    return "int8" if bnb.ROW_ABSMAX in parts else "nf4"


def _kind_in_run(config: FinetuneConfig, name: str) -> str:
    """Return how the run will hold an unquantized weight; within a budget, as if all had the same width."""
    if config.method != "qlora":
        return "keep"
    is_in_budget = config.quantize.bits is not None and not name.endswith("norm.weight")
    if not is_in_budget:
        return config.quantize.kind_of(name)
    return str(min(max(WIDTHS), math.ceil(config.quantize.bits or 0)))


def _quantized(
    kind: str, shape: tuple[int, int], empty: Callable[[Sequence[int], torch.dtype], Tensor]
) -> QuantizedWeight:
    rows, width = shape
    if kind == "nf4":
        blocks = -(-rows * width // nf4.BLOCK)
        return Nf4Weight(
            empty((-(-rows * width // 2),), torch.uint8),
            empty((blocks,), torch.uint8),
            empty((-(-blocks // nf4.NESTED_BLOCK),), torch.float32),
            torch.zeros((), device="meta"),
            shape,
        )
    if kind == "int8":
        return Int8Weight(empty(shape, torch.int8), empty((rows,), torch.float32), shape)
    blocks = -(-width // nf_bits.BLOCK)
    return NfBitsWeight(
        empty((rows, int(kind), -(-width // 8)), torch.uint8),
        empty((rows, blocks), torch.int8),
        empty((-(-rows // nf_bits.GROUP), blocks), torch.float32),
        shape,
    )
