"""GGUF, the format of llama.cpp: load a LLaMA and its tokenizer, save them in F32, F16, BF16, Q8_0 or Q4_0.

Query and key rows are interleaved (see `rotary_rows`). Norms are always float32, as llama.cpp wants vectors to be; a
matrix whose rows are no multiple of 32 stays F16 in a file of a block type. The `gguf` package, an extra, writes the
bytes and rounds to blocks.
"""

import functools
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from entrenar.data import Tokenizer
from entrenar.data.tokenizer.vocabulary import tokenizer_files
from entrenar.errors import ConfigError, FormatError
from entrenar.files import explained_disk_errors
from entrenar.interop.assemble import assemble
from entrenar.interop.gguf_file import GGUFFile, read_gguf, read_gguf_tensor, stored_dtype
from entrenar.interop.gguf_metadata import (
    architecture_metadata,
    read_architecture,
    read_vocabulary,
    rope_factors,
    vocabulary_metadata,
)
from entrenar.interop.rotary_rows import half_split, interleaved
from entrenar.interop.tokenizers import vocabulary_of
from entrenar.model import Llama, LlamaConfig

GGUFType = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}  # llama.cpp's LLAMA_FTYPE
_ROPE_FACTORS = "rope_freqs.weight"
_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def our_name(name: str) -> str | None:
    """Translate a GGUF tensor name to Hugging Face's, None where there is none."""
    if name in _OUTER:
        return _OUTER[name]
    match name.split("."):
        case ["blk", number, kind, "weight"] if kind in _INNER and number.isdecimal():
            return f"model.layers.{number}.{_INNER[kind]}.weight"
    return None


def gguf_name(name: str) -> str:
    """Translate Hugging Face's name of a LLaMA's weight to GGUF's."""
    for theirs, ours in _OUTER.items():
        if name == ours:
            return theirs
    _, _, number, kind = name.removesuffix(".weight").split(".", 3)
    return f"blk.{number}.{next(theirs for theirs, ours in _INNER.items() if ours == kind)}.weight"


def load_gguf(path: Path, *, dtype: torch.dtype | None = None) -> tuple[Llama, Tokenizer | None]:
    """Load model and tokenizer; without `dtype` as stored.

    Matrices of different types take the narrowest dtype that holds them all exactly, block types float32. Norms are
    float32 in every file and stay so: rounding one to float16 moves logits by a tenth.

    Raises:
        FormatError: naming file and field.
    """
    file = read_gguf(path)
    config = _config(file)
    model = assemble(path, config, _tensors(file, config, dtype))
    return model, load_gguf_tokenizer(file)


def load_gguf_tokenizer(file: GGUFFile) -> Tokenizer | None:
    """Return the tokenizer of a file, None where it has none.

    Raises:
        FormatError: naming file and field.
    """
    vocabulary = read_vocabulary(file.path, file.metadata)
    if vocabulary is None:
        return None
    return Tokenizer(*tokenizer_files(vocabulary, str(file.path)), str(file.path))


def _config(file: GGUFFile) -> LlamaConfig:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise FormatError(
            f"{file.path} lacks tensor token_embd.weight, so its {len(file.tensors)} tensors are not a model"
        )
    factors = file.tensors.get(_ROPE_FACTORS)
    config = read_architecture(
        file.path,
        file.metadata,
        embedding.shape[0],
        is_tied="output.weight" not in file.tensors,
        factors=None if factors is None else read_gguf_tensor(factors),
    )
    if config.num_layers > len(file.tensors):  # before a hostile header makes us build a billion layers
        raise FormatError(f"{file.path} holds {len(file.tensors)} tensors; llama.block_count is {config.num_layers}")
    return config


def _tensors(file: GGUFFile, config: LlamaConfig, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    stored = {stored_dtype(tensor) for tensor in file.tensors.values() if len(tensor.shape) > 1}
    of_matrices = dtype or functools.reduce(torch.promote_types, stored, next(iter(stored)))
    heads = {"attn_q": config.num_heads, "attn_k": config.kv_heads}
    for name, place in file.tensors.items():
        if name == _ROPE_FACTORS:
            continue
        ours = our_name(name)
        if ours is None:
            raise FormatError(f"{file.path} holds tensor {name}, which a LLaMA does not have")
        tensor = read_gguf_tensor(place)
        kind = name.split(".")[-2]
        if kind in heads:
            if tensor.ndim != 2 or tensor.shape[0] % (2 * heads[kind]):
                raise FormatError(f"{file.path}: tensor {name} has shape {tuple(tensor.shape)} for {heads[kind]} heads")
            tensor = half_split(tensor, heads[kind])
        yield ours, tensor.to(of_matrices if tensor.ndim > 1 else dtype)


def gguf_package() -> Any:
    """Return the `gguf` package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ConfigError("GGUF files are written with the gguf package: pip install 'entrenar[gguf]'") from error


def save_gguf(
    path: Path,
    config: LlamaConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
    *,
    type_name: GGUFType = "f16",
    model_name: str = "entrenar",
) -> None:
    """Write a file, one tensor in memory at a time; `weights` is a `Llama` state dict.

    Raises:
        FormatError: llama.cpp has no place for something in the config or the tokenizer.
        ConfigError: the gguf package is not installed.
    """
    gguf = gguf_package()
    keys = architecture_metadata(config)
    if tokenizer is not None:
        keys |= vocabulary_metadata(vocabulary_of(tokenizer), config.vocab_size)
    factors = rope_factors(config)
    names = {gguf_name(name): name for name in weights}
    with explained_disk_errors(path):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_name(model_name)
        writer.add_file_type(_FILE_TYPES[type_name])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in keys.items():
            _add(gguf, writer, key, value)
        if factors is not None:
            writer.add_tensor_info(_ROPE_FACTORS, factors.shape, np.dtype(np.float32), factors.nbytes)
        kinds = {theirs: _type_of(gguf, weights[ours], type_name) for theirs, ours in names.items()}
        for theirs, ours in names.items():
            _announce(gguf, writer, theirs, weights[ours], kinds[theirs])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for theirs, ours in names.items():
            writer.write_tensor_data(gguf.quants.quantize(_rows(ours, weights[ours], config), kinds[theirs]))
        writer.close()


def _announce(gguf: Any, writer: Any, name: str, weight: Tensor, kind: Any) -> None:
    """Write where a tensor will be, and what size and type it has."""
    if kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor_info(name, tuple(weight.shape), np.dtype(np.float32), weight.numel() * 4, raw_dtype=kind)
        return
    shape = gguf.quant_shape_to_byte_shape(tuple(weight.shape), kind)
    writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=kind)


def _add(gguf: Any, writer: Any, key: str, value: Any) -> None:
    kinds = gguf.GGUFValueType
    if isinstance(value, list):
        if value:  # a list without entries has no type
            sub_type = {str: kinds.STRING, int: kinds.INT32, float: kinds.FLOAT32}[type(value[0])]
            writer.add_key_value(key, value, kinds.ARRAY, sub_type)
        return
    kind = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}[type(value)]
    writer.add_key_value(key, value, kind)


def _type_of(gguf: Any, weight: Tensor, type_name: GGUFType) -> Any:
    types = gguf.GGMLQuantizationType
    if weight.ndim == 1:
        return types.F32
    if type_name in ("q8_0", "q4_0") and weight.shape[-1] % 32:
        return types.F16
    return types[type_name.upper()]


def _rows(name: str, weight: Tensor, config: LlamaConfig) -> np.ndarray[Any, np.dtype[np.float32]]:
    values = weight.detach().float().cpu()
    if name.endswith("q_proj.weight"):
        values = interleaved(values, config.num_heads)
    elif name.endswith("k_proj.weight"):
        values = interleaved(values, config.kv_heads)
    array: np.ndarray[Any, np.dtype[np.float32]] = values.contiguous().numpy()
    return array
