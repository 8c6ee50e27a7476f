"""A model without weights, and its weights without bytes: what the recipes load or make, by shape alone.

config -> modules on the meta device -> storage as the folder or the run holds it -> adapter
"""

import functools
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from entrenar.config import AnyConfig, FinetuneConfig, RunConfig
from entrenar.interop.assemble import give_storage, set_parameter
from entrenar.interop.hf import open_folder
from entrenar.interop.quantized_layout import kind_of
from entrenar.interop.safetensors_file import Entry
from entrenar.model import Llama
from entrenar.ops import KINDS, NfBitsWeight
from entrenar.ops.quantized.bits import WIDTHS
from entrenar.peft import from_base, put_quantized
from entrenar.planning.ledger import Ledger
from entrenar.quantize import check_budget


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
    """Give a model its weights without their bytes, like the run does; return those that stay in a mapped file."""
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
        kind = kind_of(parts) if is_packed else _kind_in_run(config, name)
        if kind is None:
            is_mapped = parts[""].dtype == dtype
            set_parameter(model, name, empty(shapes[name], dtype, is_mapped=is_mapped))
        else:
            shape = shapes[name][0], shapes[name][1]
            weight = KINDS[kind[0]].empty(shape, functools.partial(empty, is_mapped=is_packed), kind[1])
            put_quantized(model, name.removesuffix(".weight"), weight, dtype)
    return mapped


def _kind_in_run(config: FinetuneConfig, name: str) -> tuple[str, int] | None:
    """Return kind and width in which the run will hold an unquantized weight; in a budget all have the same width."""
    if config.method != "qlora":
        return None
    if config.quantize.bits is not None and not name.endswith("norm.weight"):
        return NfBitsWeight.kind, min(max(WIDTHS), math.ceil(config.quantize.bits))
    kind = config.quantize.kind_of(name)
    return None if kind == "keep" else (kind, 0)
