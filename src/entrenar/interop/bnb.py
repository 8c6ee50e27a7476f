"""NF4 weights as bitsandbytes and transformers lay them out in safetensors.

A projection's `weight` holds the codes as a column of bytes, stored with its scales and the tables they refer to:

    weight                            codes (bytes, 1)        weight.quant_map           the 16 levels
    weight.absmax                     scale of each block     weight.nested_quant_map    the 256 numbers of 8-bit scales
    weight.nested_absmax              scale of 256 scales     (both nested ones only where scales are quantized too)
    weight.quant_state.bitsandbytes__nf4                      a JSON object as bytes: shape, blocks, dtype, offset

`config.json` says so in `quantization_config`. What stands for other numbers than `ops.nf4` reads (another type, block
or table) is refused. Source: `QuantState` of bitsandbytes' functional.py, `BitsAndBytesConfig` of transformers.

Transformers cannot read a quantized embedding, or an int8 head, next to NF4 projections. Such a folder has the
same tensors for NF4, for int8 the codes (I8) and `weight.row_absmax`, and a `quant_method` of its own, so that it is
refused there and not misread.
"""

import json
import math
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entrenar.errors import FormatError
from entrenar.ops import Int8Weight, Nf4Weight
from entrenar.ops.quantized.nf4 import BLOCK, NESTED_BLOCK, dynamic_map, nf4_code_book
from entrenar.peft import QuantizeConfig
from entrenar.peft.quantize_config import EMBEDDING, HEAD, Kind

CONFIG_KEY = "quantization_config"
STATE = "quant_state.bitsandbytes__nf4"
ROW_ABSMAX = "row_absmax"
METHOD, VERSION = "entrenar-nf4", 1
_PARTS = ("absmax", "nested_absmax", "nested_quant_map", "quant_map", STATE)
PARTS = (*_PARTS, ROW_ABSMAX)
# The tables of another machine's build may differ in the last bit; bitsandbytes compares them so loosely.
_SAME_TABLE = 1e-6
_LARGEST_OFFSET = torch.finfo(torch.float32).max


def is_quantized(name: str) -> bool:
    """Return whether a weight is a projection; this layout always holds projections in NF4."""
    return name.endswith("_proj.weight")


def quantization_config(dtype: torch.dtype, held: QuantizeConfig, *, is_tied: bool) -> dict[str, Any]:
    """Return the entry in `config.json` for weights in this layout, computed in `dtype`."""
    kinds = {"embedding": held.kind_of(EMBEDDING), "head": "keep" if is_tied else held.kind_of(HEAD)}
    is_theirs = kinds["embedding"] == "keep" and kinds["head"] != "int8"
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
        "llm_int8_skip_modules": ["lm_head"] if kinds["head"] == "keep" else [],
    }
    if is_theirs:
        return config
    # Without `load_in_4bit`, by which transformers knows bitsandbytes whatever the method is called.
    return {"quant_method": METHOD, "version": VERSION, "projections": "nf4", **kinds}


def check_config(values: Mapping[str, Any], path: Path) -> bool:
    """Return whether a `config.json` announces weights in this layout.

    Raises:
        FormatError: it announces another quantization.
    """
    config = values.get(CONFIG_KEY)
    if config is None:
        return False
    found = {"bnb_4bit_quant_storage": "uint8", **config} if isinstance(config, Mapping) else {}
    wanted = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    wanted["bnb_4bit_quant_storage"] = "uint8"
    if found.get("quant_method") == METHOD:
        wanted = {"version": VERSION, "projections": "nf4"}
    for key, value in wanted.items():
        if found.get(key) != value:
            raise FormatError(
                f"{path}: {CONFIG_KEY}.{key} must be {value!r}, got {found.get(key)!r}; read are plain weights and "
                "bitsandbytes' NF4, so convert the original weights with `entrenar convert --to nf4`"
            )
    return True


def check_kinds(values: Mapping[str, Any], parts: Mapping[str, Set[str]], path: Path) -> None:
    """Check that the weights of a folder are held as its `config.json` announces: int8 only where it names it.

    Raises:
        FormatError.
    """
    config = values[CONFIG_KEY]
    method = config["quant_method"]
    named = {"embedding": EMBEDDING, "head": HEAD} if method == METHOD else {}
    for key, name in named.items():
        found: Kind = "int8" if ROW_ABSMAX in parts.get(name, ()) else "nf4" if STATE in parts.get(name, ()) else "keep"
        if config.get(key) != found:
            raise FormatError(
                f"{path}: {CONFIG_KEY}.{key} is {config.get(key)!r}, but {name} is held as {found}; quantize the "
                "original weights again with `entrenar convert --to nf4`"
            )
    for name, held in parts.items():
        for part in sorted(held - {"", *_PARTS, *([ROW_ABSMAX] if name in named.values() else [])}):
            raise FormatError(
                f"{path}: {CONFIG_KEY}.quant_method is {method!r}, which has no {part} of {name}, but the file has; "
                "quantize the original weights again with `entrenar convert --to nf4`"
            )


def pack_int8(name: str, weight: Int8Weight, dtype: torch.dtype) -> dict[str, Tensor]:  # noqa: ARG001  # a layout's
    """Return the tensors of one weight by their names in the file."""
    return {name: weight.codes.cpu(), f"{name}.{ROW_ABSMAX}": weight.absmax.cpu()}


def pack_nf4(name: str, weight: Nf4Weight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the stored tensors of one weight by file name; `dtype` is the weight's dtype before quantization."""
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": BLOCK}
    state |= {"dtype": str(dtype).removeprefix("torch."), "shape": list(weight.shape)}
    tensors = {"absmax": weight.absmax, "quant_map": nf4_code_book()}
    if weight.nested_absmax is not None and weight.offset is not None:
        tensors |= {"nested_absmax": weight.nested_absmax, "nested_quant_map": dynamic_map()}
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": weight.offset.item()}
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {name: weight.codes[:, None], **{f"{name}.{part}": tensor.cpu() for part, tensor in tensors.items()}}


def unpack(name: str, read: Callable[[str], Tensor], parts: Set[str], path: Path) -> Nf4Weight | Int8Weight:
    """Put a weight together; `read` returns the tensor of one of its existing `parts`, with '' for the codes.

    Raises:
        FormatError: it lacks a part, a part has another size than the shape asks for, or it means other numbers.
    """
    place = f"{path}: tensor {name}"
    if ROW_ABSMAX in parts:
        return _unpack_int8(read, place)
    _check_parts(parts, {STATE}, place)
    state = _state(read(STATE), place)
    is_nested = "nested_blocksize" in state
    _check_parts(
        parts, {"absmax", "quant_map"} | ({"nested_absmax", "nested_quant_map"} if is_nested else set()), place
    )
    _check_table(read("quant_map"), nf4_code_book(), f"{place}.quant_map", "the 16 levels of NF4")
    blocks = -(-math.prod(state["shape"]) // BLOCK)
    codes = _sized(read(""), torch.uint8, -(-math.prod(state["shape"]) // 2), place)
    absmax = _sized(read("absmax"), torch.uint8 if is_nested else torch.float32, blocks, f"{place}.absmax")
    rows, columns = state["shape"]
    if not is_nested:
        return Nf4Weight(codes, absmax, None, None, (rows, columns))
    _check_table(read("nested_quant_map"), dynamic_map(), f"{place}.nested_quant_map", "the 8-bit dynamic map")
    nested = _sized(read("nested_absmax"), torch.float32, -(-blocks // NESTED_BLOCK), f"{place}.nested_absmax")
    offset = torch.tensor(state["nested_offset"], dtype=torch.float32)
    return Nf4Weight(codes, absmax, nested, offset, (rows, columns))


def _unpack_int8(read: Callable[[str], Tensor], place: str) -> Int8Weight:
    codes = read("")
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise FormatError(f"{place} must be a matrix of torch.int8, got {codes.dtype} of {tuple(codes.shape)}")
    rows, columns = codes.shape
    absmax = _sized(read(ROW_ABSMAX), torch.float32, rows, f"{place}.{ROW_ABSMAX}")
    return Int8Weight(codes, absmax, (rows, columns))


def _check_parts(found: Set[str], needed: Set[str], place: str) -> None:
    for part in sorted(needed - found):
        raise FormatError(f"{place} lacks its {part}; a weight in NF4 has codes and {', '.join(_PARTS)}")


def _state(raw: Tensor, place: str) -> dict[str, Any]:
    if raw.dtype != torch.uint8 or raw.ndim != 1:
        raise FormatError(f"{place}.{STATE} must be bytes in a row, got {raw.dtype} of shape {tuple(raw.shape)}")
    try:
        state = json.loads(bytes(raw.tolist()))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{place}.{STATE} is no JSON: {error}") from error
    if not isinstance(state, dict):
        raise FormatError(f"{place}.{STATE} must be a JSON object, got {state!r:.80}")
    wanted = {"quant_type": "nf4", "blocksize": BLOCK}
    if "nested_blocksize" in state:
        wanted |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}
    for key, value in wanted.items():
        if state.get(key) != value:
            raise FormatError(
                f"{place}.{STATE}: {key} must be {value!r}, got {state.get(key)!r}; quantize the original weights "
                "again with `entrenar convert --to nf4`"
            )
    shape = state.get("shape")
    offset: Any = state.get("nested_offset", None if "nested_blocksize" in state else 0.0)
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)):
        raise FormatError(f"{place}.{STATE}: shape must be two positive numbers, got {shape!r}")
    if not (type(offset) in (int, float) and abs(offset) <= _LARGEST_OFFSET):  # false for NaN
        raise FormatError(f"{place}.{STATE}: nested_offset must be a finite number of float32, got {offset!r:.40}")
    return state


def _sized(tensor: Tensor, dtype: torch.dtype, count: int, place: str) -> Tensor:
    if tensor.dtype != dtype or tensor.numel() != count:
        raise FormatError(f"{place} must hold {count} of {dtype}, got {tensor.numel()} of {tensor.dtype}")
    return tensor.view(-1)


def _check_table(found: Tensor, wanted: Tensor, place: str, what: str) -> None:
    if found.shape != wanted.shape or not bool(((found - wanted).abs() <= _SAME_TABLE).all()):
        raise FormatError(
            f"{place} must be {what}, got another table: these codes mean other numbers than are read here"
        )
