"""Weights of many widths in safetensors: a layout of our own, because no other has them.

    weight            planes of bits (O, k, bytes)      weight.scales     a scale's code for each block (O, blocks)
    weight.tops       the largest scale of 256 rows, for each block of a row

`config.json` says so in `quantization_config`, with width and shape of each matrix and the levels of each width: a
reader needs nothing else to know what the numbers are, level[code] · scale · top / 127 (`ops.quantized.bits`).
transformers does not read it, and says so.
"""

import math
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entrenar.errors import FormatError
from entrenar.interop.safetensors_file import Entry
from entrenar.ops import NfBitsWeight
from entrenar.ops.quantized.bits import BLOCK, GROUP, WIDTHS, nf_bits_levels

METHOD, VERSION = "entrenar-nf-bits", 1
PARTS = ("scales", "tops")
# Levels computed by another machine's library may differ in the last bit.
_SAME_LEVEL = 1e-6


def quantization_config(weights: Mapping[str, NfBitsWeight], total_bits: float) -> dict[str, Any]:
    """Return the entry in `config.json` for weights in this layout; `total_bits` is the mean, everything included."""
    levels = {str(bits): nf_bits_levels(bits).tolist() for bits in sorted({weight.bits for weight in weights.values()})}
    matrices = {
        name.removesuffix(".weight"): {"bits": weight.bits, "shape": list(weight.shape)}
        for name, weight in weights.items()
    }
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "bits": round(total_bits, 4),
        "block_size": BLOCK,
        "group_size": GROUP,
        "levels": levels,
        "matrices": matrices,
    }


def check_config(config: Mapping[str, Any], path: Path) -> None:
    """Check that weights announced in this layout mean what is read here.

    Raises:
        FormatError: another version, block, or table of levels.
    """
    for key, wanted in {"version": VERSION, "block_size": BLOCK, "group_size": GROUP}.items():
        if config.get(key) != wanted:
            raise FormatError(
                f"{path}: quantization_config.{key} must be {wanted}, got {config.get(key)!r}; quantize the original "
                "weights again with `entrenar convert --to nf4 --bits`"
            )
    levels = config.get("levels")
    if not isinstance(levels, Mapping) or not levels:
        raise FormatError(f"{path}: quantization_config.levels must be a table from width to levels, got {levels!r}")
    for width, table in levels.items():
        wanted_levels = nf_bits_levels(int(width)).tolist() if width in map(str, WIDTHS) else []
        if not _is_same(table, wanted_levels):
            raise FormatError(
                f"{path}: quantization_config.levels of {width} bits are another table: these codes mean other numbers "
                "than are read here"
            )


def check_matrices(
    config: Mapping[str, Any],
    places: Mapping[str, Mapping[str, tuple[Path, Entry]]],
    shapes: Mapping[str, tuple[int, ...]],
    path: Path,
) -> None:
    """Check that each matrix has the width and shape that `config.json` announces, and that there are no others.

    `shapes` are the architecture's: codes fill whole bytes, and cannot tell a width from the next.

    Raises:
        FormatError.
    """
    announced, levels = config.get("matrices"), config["levels"]
    if not isinstance(announced, Mapping):
        raise FormatError(f"{path}: quantization_config.matrices must be a table by name, got {announced!r:.80}")
    held = {name.removesuffix(".weight") for name, parts in places.items() if len(parts) > 1}
    for name in sorted(held ^ announced.keys()):
        raise FormatError(
            f"{path}: quantization_config.matrices "
            + (f"lacks {name}, which is held in few bits" if name in held else f"has {name}, which is not there")
        )
    for name, said in announced.items():
        _, codes = places[f"{name}.weight"][""]
        match said:
            case {"bits": int(bits), "shape": [int(rows), int(width)]} if str(bits) in levels:
                wanted: tuple[int, ...] = (rows, bits, math.ceil(width / 8))
            case _:
                raise FormatError(
                    f"{path}: quantization_config.matrices of {name} must have bits, one of {', '.join(levels)}, and "
                    f"a shape of two numbers, got {said!r:.80}"
                )
        if (rows, width) != shapes[f"{name}.weight"]:
            raise FormatError(
                f"{path}: quantization_config.matrices says {name} has shape {(rows, width)}, the rest of the file "
                f"asks for {shapes[f'{name}.weight']}"
            )
        if codes.shape != wanted:
            raise FormatError(
                f"{path}: quantization_config.matrices says that {name} has {bits} bits and shape {(rows, width)}, "
                f"its codes {codes.shape} are of another weight"
            )


def _is_same(table: Any, wanted: list[float]) -> bool:
    if not wanted or not isinstance(table, list) or len(table) != len(wanted):
        return False
    return all(
        isinstance(level, int | float) and abs(level - right) <= _SAME_LEVEL
        for level, right in zip(table, wanted, strict=True)
    )


def pack(name: str, weight: NfBitsWeight, dtype: torch.dtype) -> dict[str, Tensor]:  # noqa: ARG001  # a layout's
    """Return the tensors of one weight by their names in the file."""
    parts = {name: weight.codes, f"{name}.scales": weight.scales, f"{name}.tops": weight.tops}
    return {part: tensor.cpu().contiguous() for part, tensor in parts.items()}


def unpack(
    name: str, read: Callable[[str], Tensor], parts: Set[str], shape: tuple[int, int], path: Path
) -> NfBitsWeight:
    """Put a weight of a known shape and an announced width together.

    `read` returns the tensor of one of its `parts`, '' the codes, which are there.

    Raises:
        FormatError: it lacks a part, or a part is not as the shape asks.
    """
    place, (rows, width) = f"{path}: tensor {name}", shape
    for part in sorted(set(PARTS) - parts):
        raise FormatError(f"{place} lacks its {part}; a weight of a width has codes, scales and tops")
    codes, blocks = read(""), math.ceil(width / BLOCK)
    return NfBitsWeight(
        _checked(codes, torch.uint8, (rows, codes.shape[1], math.ceil(width / 8)), place),
        _checked(read("scales"), torch.int8, (rows, blocks), f"{place}.scales"),
        _checked(read("tops"), torch.float32, (math.ceil(rows / GROUP), blocks), f"{place}.tops"),
        shape,
    )


def _checked(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], place: str) -> Tensor:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise FormatError(
            f"{place} must hold {dtype} of shape {shape}, got {tensor.dtype} of {tuple(tensor.shape)}; the file is "
            "damaged or of another model"
        )
    return tensor
