"""Lay out each kind of quantized weight in a model folder: one table, by kind.

A weight is one tensor, or several whose names share its own: codes under the weight's name, scales and tables under
`weight.PART`. `bnb` and `bits` have the layouts; here they are found, by the kind of a weight that is written and by
the parts of one that is read.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from entrenar.errors import FormatError
from entrenar.interop import bits, bnb
from entrenar.interop.safetensors_file import Entry, TensorReader
from entrenar.ops import Int8Weight, Nf4Weight, NfBitsWeight, QuantizedWeight

CONFIG_KEY = bnb.CONFIG_KEY
# By the name of its part in the file ('' for the tensor itself), the file that holds it and its place there.
Parts = Mapping[str, tuple[Path, Entry]]
Pack = Callable[[str, Any, torch.dtype], dict[str, Tensor]]
_PACK: Mapping[str, Pack] = {
    Nf4Weight.kind: bnb.pack_nf4,
    Int8Weight.kind: bnb.pack_int8,
    NfBitsWeight.kind: bits.pack,
}


def pack(name: str, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the stored tensors of one weight by file name; `dtype` is the weight's dtype before quantization.

    Raises:
        FormatError: no folder has a layout for its kind.
    """
    if weight.kind not in _PACK:
        raise FormatError(
            f"{name} is held as {weight.kind}, and no folder has a layout for that; widen the model before saving it"
        )
    return _PACK[weight.kind](name, weight, dtype)


def is_announced(values: Mapping[str, Any], path: Path) -> bool:
    """Return whether a `config.json` announces quantized weights.

    Raises:
        FormatError: it announces a quantization that is not read here.
    """
    config = values.get(CONFIG_KEY)
    if isinstance(config, dict) and config.get("quant_method") == bits.METHOD:
        bits.check_config(config, path)
        return True
    return bnb.check_config(values, path)


def check_announced(
    values: Mapping[str, Any], places: Mapping[str, Parts], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> None:
    """Check that the weights of a folder are those that its `config.json` announces.

    Raises:
        FormatError.
    """
    if values[CONFIG_KEY]["quant_method"] == bits.METHOD:
        bits.check_matrices(values[CONFIG_KEY], places, shapes, path)
    else:
        bnb.check_kinds(values, {name: parts.keys() for name, parts in places.items()}, path)


def weight_part(name: str) -> tuple[str, str]:
    """Split a tensor's name in a file into weight name and part; the part of the codes themselves is ''."""
    for part in (*bits.PARTS, *bnb.PARTS):
        if name.endswith(f".weight.{part}"):
            return name.removesuffix(f".{part}"), part
    return name, ""


def kind_of(parts: Mapping[str, Entry]) -> tuple[str, int] | None:
    """Return kind and width of a weight by its parts in a file; None for a plain weight."""
    if len(parts) == 1:
        return None
    if bits.PARTS[0] in parts:
        return NfBitsWeight.kind, parts[""].shape[1]
    return (Int8Weight.kind, 8) if bnb.ROW_ABSMAX in parts else (Nf4Weight.kind, 4)


def read(name: str, parts: Parts, shape: tuple[int, ...], reader: TensorReader) -> QuantizedWeight:
    """Put a weight of a known shape together from its parts.

    Raises:
        FormatError: a part is missing or damaged, or the weight has another shape.
    """

    def tensor(part: str) -> Tensor:
        path, entry = parts[part]
        return reader.read(path, f"{name}.{part}" if part else name, entry, entry.dtype)

    path, wanted = next(iter(parts.values()))[0], cast(tuple[int, int], shape)
    if parts.keys() & set(bits.PARTS):
        return bits.unpack(name, tensor, parts.keys(), wanted, path)
    weight = bnb.unpack(name, tensor, parts.keys(), path)
    if weight.shape != wanted:
        raise FormatError(f"{path}: tensor {name} has shape {weight.shape}, config.json asks for {wanted}")
    return weight


def missing_part(codes: torch.dtype) -> str:
    """Return the part that codes of this dtype cannot do without, for the message about codes that stand alone."""
    return bnb.ROW_ABSMAX if codes == torch.int8 else "scales"
