"""llama2.c's model files (github.com/karpathy/llama2.c, `export.py`): versions 0 and 1 in float32, version 2 in Q8_0.

All numbers are little-endian. Seven int32 say dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len.

    version 0  the seven; then embedding, all attention norms, wq, wk, wv, wo, all MLP norms, w1, w2, w3, final norm,
               two rotary tables (cos and sin, which readers skip), and the head where vocab_size is negative
    version 1  "ak42", 1, the seven, one byte "head is the embedding", zeros up to byte 256; then all attention norms,
               all MLP norms, final norm, embedding, wq, wk, wv, wo, w1, w2, w3, head
    version 2  "ak42", 2, the seven, the byte, the group size; the order of version 1, the norms in float32, each other
               tensor of each layer as int8 numbers and then a float32 scale for each group

w1 is the gate, w2 the way down, w3 the way up. Query and key rows are interleaved. Its program run.c reads version 0,
runq.c version 2; version 1 is for others' programs. What the files do not say is fixed in its programs: eps 1e-5,
theta 10000, no rotary scaling.
"""

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from entrenar.errors import FormatError
from entrenar.files import explained_disk_errors
from entrenar.interop.assemble import assemble
from entrenar.interop.rotary_rows import half_split, interleaved
from entrenar.model import Llama, LlamaConfig
from entrenar.model.rope_scaling import inverse_frequencies

Version = Literal[0, 1, 2]
MAGIC = b"24ka"  # 0x616b3432, written little-endian
HEADER_BYTES, _HEADER_0_BYTES = 256, 28
EPS, THETA = 1e-5, 10000.0
_LARGEST_GROUP = 64
_ATTENTION_NORM, _MLP_NORM = "input_layernorm.weight", "post_attention_layernorm.weight"
_Q, _K, _V, _O = (f"self_attn.{name}_proj.weight" for name in "qkvo")
_GATE, _DOWN, _UP = (f"mlp.{name}_proj.weight" for name in ("gate", "down", "up"))
_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class Header:
    """The header before the weights."""

    version: int
    config: LlamaConfig
    start: int
    group_size: int = 0


def read_header(path: Path) -> Header:
    """Read the header and check that the file has exactly the size that follows from it.

    Raises:
        FormatError: naming the file and the field.
    """
    with path.open("rb") as stream:
        head = stream.read(HEADER_BYTES)
    size = path.stat().st_size
    if head[:4] != MAGIC:
        if len(head) < _HEADER_0_BYTES:
            raise FormatError(f"{path} is no llama2.c file: it has {len(head)} bytes, its header {_HEADER_0_BYTES}")
        numbers = struct.unpack_from("<7i", head)
        header = Header(0, _config(path, numbers, is_tied=numbers[5] > 0), _HEADER_0_BYTES)
    else:
        if len(head) < HEADER_BYTES:
            raise FormatError(f"{path} ends in the middle of its header, after {len(head)} of {HEADER_BYTES} bytes")
        version, *numbers_list, tied_byte, group = struct.unpack_from("<i7iBi", head, 4)
        if version not in (1, 2):
            raise FormatError(f"{path}: version must be 0, 1 or 2, got {version}")
        if tied_byte > 1 or (version == 2 and group <= 0):
            raise FormatError(
                f"{path}: the head's byte must be 0 or 1 and the group size > 0, got {tied_byte}, {group}"
            )
        config = _config(path, tuple(numbers_list), is_tied=tied_byte == 1)
        header = Header(version, config, HEADER_BYTES, group if version == 2 else 0)
    expected = _expected_size(path, header)
    if size != expected:
        raise FormatError(f"{path}: a version {header.version} file of this header has {expected} bytes, got {size}")
    return header


def _config(path: Path, numbers: tuple[int, ...], *, is_tied: bool) -> LlamaConfig:
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = numbers
    if n_heads <= 0 or dim % n_heads:
        raise FormatError(f"{path}: dim must be a multiple of n_heads > 0, got {dim} and {n_heads}: no llama2.c file?")
    try:
        return LlamaConfig(
            vocab_size=abs(vocab_size), hidden_size=dim, num_layers=n_layers, num_heads=n_heads,
            num_kv_heads=n_kv_heads, intermediate_size=hidden_dim, max_seq_len=max_seq_len,
            rms_norm_eps=EPS, rope_theta=THETA, tie_word_embeddings=is_tied, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, fault['loc']))} {fault['msg']}" for fault in error.errors())
        raise FormatError(f"{path}: not a llama2.c file, its header does not describe a LLaMA: {faults}") from error


def _expected_size(path: Path, header: Header) -> int:
    config = header.config
    norms = (2 * config.num_layers + 1) * config.hidden_size
    matrices = config.parameter_count() - norms
    if header.version == 2:
        if config.hidden_size % header.group_size or config.intermediate_size % header.group_size:
            raise FormatError(
                f"{path}: group size must divide dim and hidden_dim, got {header.group_size} for "
                f"{config.hidden_size} and {config.intermediate_size}"
            )
        return header.start + 4 * norms + matrices + 4 * (matrices // header.group_size)
    tables = config.max_seq_len * config.head_width if header.version == 0 else 0
    return header.start + 4 * (norms + matrices + tables)


def _order(header: Header) -> Iterator[tuple[str, int]]:
    """Yield the name and the number of heads to reorder (0 for none) of each tensor, in the file's order."""
    config = header.config
    heads = {_Q: config.num_heads, _K: config.kv_heads}
    if header.version == 0:
        groups = (_EMBEDDING, _ATTENTION_NORM, _Q, _K, _V, _O, _MLP_NORM, _GATE, _DOWN, _UP, _NORM)
    else:
        groups = (_ATTENTION_NORM, _MLP_NORM, _NORM, _EMBEDDING, _Q, _K, _V, _O, _GATE, _DOWN, _UP)
    for name in groups:
        if name in (_EMBEDDING, _NORM):
            yield name, 0
            continue
        for layer in range(config.num_layers):
            yield f"model.layers.{layer}.{name}", heads.get(name, 0)
    if not config.tie_word_embeddings:
        yield _HEAD, 0


def load_llama2c(path: Path, *, dtype: torch.dtype = torch.float32) -> Llama:
    """Load a file of version 0, 1 or 2.

    Raises:
        FormatError: naming the file and the field.
    """
    header = read_header(path)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in Llama(header.config).named_parameters()}

    def tensors(stream: BinaryIO) -> Iterator[tuple[str, Tensor]]:
        stream.seek(header.start)
        for name, heads in _order(header):
            if name == _HEAD and header.version == 0:
                stream.seek(4 * header.config.max_seq_len * header.config.head_width, 1)
            is_quantized = header.version == 2 and not name.endswith("norm.weight")
            tensor = _read(stream, shapes[name], header.group_size if is_quantized else 0)
            yield name, (half_split(tensor, heads) if heads else tensor).to(dtype)

    with path.open("rb") as stream:
        return assemble(path, header.config, tensors(stream))


def _read(stream: BinaryIO, shape: torch.Size, group_size: int) -> Tensor:
    count = math.prod(shape)
    if not group_size:
        return torch.from_numpy(np.fromfile(stream, "<f4", count)).view(shape)
    numbers = torch.from_numpy(np.fromfile(stream, np.int8, count)).view(-1, group_size)
    scales = torch.from_numpy(np.fromfile(stream, "<f4", count // group_size))
    return (numbers * scales[:, None]).view(shape)


def save_llama2c(path: Path, config: LlamaConfig, weights: Mapping[str, Tensor], *, version: Version = 0) -> None:
    """Write a file; `weights` is a `Llama` state dict.

    Raises:
        FormatError: llama2.c has no place for something in the config.
    """
    check_expressible(config)
    group_size = group_size_of(config) if version == 2 else 0
    header = Header(version, config, HEADER_BYTES if version else _HEADER_0_BYTES, group_size)
    with explained_disk_errors(path), path.open("wb") as stream:
        stream.write(_header_bytes(header))
        for name, heads in _order(header):
            tensor = weights[name].detach().float().cpu()
            if heads:
                tensor = interleaved(tensor, heads)
            if version == 2 and not name.endswith("norm.weight"):
                parts: tuple[Tensor, ...] = quantize_q8_0(tensor, group_size)
            else:
                parts = (tensor.contiguous(),)
            if version == 0 and name == _NORM:
                parts = (*parts, *_rotation_tables(config))
            for part in parts:
                stream.write(part.numpy().data)


def _rotation_tables(config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines that version 0 keeps behind the last norm, each (P, K/2)."""
    frequencies, _ = inverse_frequencies(config, 0)
    angles = torch.arange(config.max_seq_len)[:, None] * frequencies
    return angles.cos(), angles.sin()


def _header_bytes(header: Header) -> bytes:
    config = header.config
    numbers = (config.hidden_size, config.intermediate_size, config.num_layers, config.num_heads, config.kv_heads)
    if header.version == 0:
        vocab_size = config.vocab_size if config.tie_word_embeddings else -config.vocab_size
        return struct.pack("<7i", *numbers, vocab_size, config.max_seq_len)
    head = MAGIC + struct.pack("<i5i", header.version, *numbers)
    head += struct.pack("<2iB", config.vocab_size, config.max_seq_len, config.tie_word_embeddings)
    return (head + struct.pack("<i", header.group_size)).ljust(HEADER_BYTES, b"\0")


def group_size_of(config: LlamaConfig) -> int:
    """Return the numbers that share a scale: as many as divide every row, since a group must not cross rows."""
    return math.gcd(config.hidden_size, config.intermediate_size, _LARGEST_GROUP)


def check_expressible(config: LlamaConfig) -> None:
    """Refuse what llama2.c's program has fixed to something else.

    Raises:
        FormatError.
    """
    fixed = {
        "rms_norm_eps": (config.rms_norm_eps, EPS),
        "rope_theta": (config.rope_theta, THETA),
        "rope_scaling": (config.rope_scaling, None),
        "head_dim": (config.head_width, config.hidden_size // config.num_heads),
    }
    for name, (value, wanted) in fixed.items():
        if value != wanted:
            raise FormatError(f"llama2.c has {name} = {wanted} in its program, the model has {value}; convert to gguf")


def quantize_q8_0(tensor: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Return int8 numbers and a scale for each group; number times scale is within half a scale of the weight."""
    groups = tensor.reshape(-1, group_size)
    scales = groups.abs().amax(dim=1) / 127
    # a group of zeros has scale 0 and numbers 0
    numbers = (groups / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().clamp(-127, 127)
    return numbers.to(torch.int8), scales
