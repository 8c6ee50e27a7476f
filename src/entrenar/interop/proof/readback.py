"""Readers of written files that share nothing with what wrote them: safetensors and NF4 by hand, GGUF by its own
package, llama2.c by counting offsets.

They exist for verification only. They are simple and believe the file, because the file was just written here.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from entrenar.interop.gguf import gguf_package
from entrenar.interop.llama2c import HEADER_BYTES
from entrenar.interop.proof.numpy_llama import Array, Shape, Weights
from entrenar.interop.proof.piece_encoder import PieceEncoder
from entrenar.model import LlamaConfig
from entrenar.model.rope_scaling import inverse_frequencies

_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "U8": "u1", "I8": "i1"}

_ROLES = ("bos", "eos")


@dataclass(frozen=True)
class FileRows:
    """A matrix or vector in a file, of which nothing is in memory but the rows that are asked for."""

    shape: tuple[int, ...]
    read: Callable[[int, int], Array]

    def __getitem__(self, index: Any) -> Array:
        """Return the rows of a slice or of an array of numbers."""
        width = math.prod(self.shape[1:])
        if isinstance(index, slice):
            start, stop, _ = index.indices(self.shape[0])
            return self.read(start * width, stop * width).reshape(-1, *self.shape[1:])
        rows = [self.read(row * width, (row + 1) * width) for row in np.asarray(index).reshape(-1).tolist()]
        return np.stack(rows).reshape(*np.shape(index), *self.shape[1:])


@dataclass(frozen=True)
class Readback:
    """What an independent reader found: the weights by Hugging Face's names, in the file's own order of rows.

    Attributes:
        encode: the tokenizer in the file, None where it holds none.
        id_of: the id of a token by its name, where the file has names.
        roles: which tokens begin and end a text, where the file says so.
    """

    names: frozenset[str]
    weight: Weights
    shape: Shape
    encode: Any = None
    id_of: Callable[[str], int | None] | None = None
    roles: Mapping[str, int | None] = field(default_factory=dict)


def _frequencies(config: LlamaConfig, theta: float, width: int) -> tuple[Array, float]:
    if config.rope_scaling is None:
        return theta ** -(np.arange(0, width, 2) / width), 1.0
    # Stretched frequencies are proved against transformers' in the model's own tests; here only their order matters.
    frequencies, scale = inverse_frequencies(config, 0)
    return frequencies.numpy(), scale


def read_hf_folder(folder: Path, config: LlamaConfig) -> Readback:
    """Read safetensors by hand and tokenizer.json by the `tokenizers` package."""
    written = _of_any_writer(json.loads((folder / "config.json").read_text("utf-8")))
    places: dict[str, tuple[Path, Mapping[str, Any], int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
        places |= {name: (path, entry, 8 + size) for name, entry in header.items() if name != "__metadata__"}

    def part(name: str, start: int = 0, stop: int | None = None) -> Array:
        path, entry, data = places[name]
        begin, end = entry["data_offsets"]
        size = (end - begin) // math.prod(entry["shape"])
        count = (math.prod(entry["shape"]) if stop is None else stop) - start
        raw = np.fromfile(path, np.uint8, count * size, offset=data + begin + start * size)
        if entry["dtype"] == "BF16":
            values: Array = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
            return values
        return raw.view(_NUMPY[entry["dtype"]])

    def weight(name: str) -> FileRows:
        state = f"{name}.quant_state.bitsandbytes__nf4"
        if state in places:
            shape = tuple(json.loads(part(state).tobytes())["shape"])
            return FileRows(shape, _nf4_numbers(lambda kind, *span: part(f"{name}{kind}", *span)))
        if f"{name}.row_absmax" in places:
            return _int8_rows(tuple(places[name][1]["shape"]), lambda kind, *span: part(f"{name}{kind}", *span))
        if f"{name}.scales" in places:
            return _bits_rows(places, name, part, written["quantization_config"])
        return FileRows(tuple(places[name][1]["shape"]), lambda start, stop: part(name, start, stop))

    frequencies, scale = _frequencies(config, written["rope_theta"], written["head_dim"])
    shape = Shape(
        written["num_hidden_layers"], written["num_attention_heads"], written["num_key_value_heads"],
        written["rms_norm_eps"], frequencies, scale, is_interleaved=False, is_tied=written["tie_word_embeddings"],
    )  # fmt: skip
    encode, id_of, roles = None, None, {}
    if (folder / "tokenizer.json").is_file():
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        backend.encode_special_tokens = True
        encode = lambda text: backend.encode(text, add_special_tokens=False).ids  # noqa: E731
        id_of = backend.token_to_id
        beside = folder / "tokenizer_config.json"
        said = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
        tokens = {role: said.get(f"{role}_token") or "" for role in _ROLES}
        roles = {role: id_of(token["content"] if isinstance(token, dict) else token) for role, token in tokens.items()}
    names = frozenset(name for name in places if name.endswith(".weight"))
    unknown = {name for name in places if ".weight." in name and name.partition(".weight.")[0] + ".weight" not in names}
    return Readback(names | unknown, weight, shape, encode, id_of, roles)


def _of_any_writer(written: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json with the keys that some writers leave out or spell otherwise, by transformers' rules."""
    heads = written["num_attention_heads"]
    theta = (written.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    assumed = {"head_dim": written["hidden_size"] // heads, "num_key_value_heads": heads, "rms_norm_eps": 1e-6}
    assumed |= {"rope_theta": theta, "tie_word_embeddings": False}
    return assumed | {key: value for key, value in written.items() if value is not None}


def _nf4_numbers(part: Callable[..., Array]) -> Callable[[int, int], Array]:
    """Return a reader of a span of numbers, from codes and scales by their definition in bitsandbytes."""
    state = json.loads(part(".quant_state.bitsandbytes__nf4").tobytes())
    levels, block = part(".quant_map"), state["blocksize"]
    pairs = np.stack((np.repeat(levels, 16), np.tile(levels, 16)), axis=1)  # of each byte, the high half first

    def magnitudes(start: int, stop: int) -> Array:
        scales = part(".absmax", start, stop)
        if "nested_offset" not in state:
            return scales
        nested = part(".nested_absmax")[np.arange(start, stop) // state["nested_blocksize"]]
        values: Array = part(".nested_quant_map")[scales] * nested + np.float32(state["nested_offset"])
        return values

    def numbers(start: int, stop: int) -> Array:
        codes = part("", start // 2, -(-stop // 2))
        scales = np.repeat(magnitudes(start // block, -(-stop // block)), block)[start % block :]
        values: Array = pairs[codes].reshape(-1)[start % 2 :][: stop - start] * scales[: stop - start]
        return values

    return numbers


def _int8_rows(shape: tuple[int, int], part: Callable[..., Array]) -> FileRows:
    """Return a weight of eight bits by its definition in `interop.bnb`."""

    def numbers(start: int, stop: int) -> Array:
        scales = part(".row_absmax", start // shape[1], stop // shape[1]) / np.float32(127)
        return part("", start, stop) * np.repeat(scales, shape[1])

    return FileRows(shape, numbers)


def _bits_rows(places: Mapping[str, Any], name: str, part: Callable[..., Array], config: Mapping[str, Any]) -> FileRows:
    """Return a weight in planes of bits, by its definition in `interop.bits`."""
    num_rows, bits, size = places[name][1]["shape"]
    blocks = places[f"{name}.scales"][1]["shape"][1]
    levels = np.array(config["levels"][str(bits)], np.float32)
    tops = part(f"{name}.tops").reshape(-1, blocks)
    width = config["matrices"][name.removesuffix(".weight")]["shape"][1]

    def numbers(start: int, stop: int) -> Array:
        first, last = start // width, stop // width
        raw = part(name, first * bits * size, last * bits * size).reshape(-1, bits, size)
        planes = np.unpackbits(raw, axis=2, bitorder="little")[:, :, :width]
        codes = (planes * (1 << np.arange(bits))[:, None]).sum(1)
        scales = part(f"{name}.scales", first * blocks, last * blocks).reshape(-1, blocks)
        scales = scales * (tops[np.arange(first, last) // config["group_size"]] / np.float32(127))
        values: Array = levels[codes] * scales[:, np.arange(width) // config["block_size"]]
        return values.astype(np.float32)

    return FileRows((num_rows, width), numbers)


def read_gguf_file(path: Path, config: LlamaConfig) -> Readback:
    """Read with the gguf package: its reader, its table of names, its dequantization."""
    gguf = gguf_package()
    reader = gguf.GGUFReader(path)
    found = {tensor.name.removesuffix(".weight"): tensor for tensor in reader.tensors}
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)

    def weight(name: str) -> Array:
        tensor = found[table.get_name(name.removesuffix(".weight"))]
        values: Array = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        return values

    def key(name: str) -> Any:
        return reader.get_field(name).contents()

    frequencies, scale = _frequencies(config, key("llama.rope.freq_base"), key("llama.rope.dimension_count"))
    if "rope_freqs" in found:
        unstretched = config.model_copy(update={"rope_scaling": None})
        plain, scale = _frequencies(unstretched, key("llama.rope.freq_base"), key("llama.rope.dimension_count"))
        frequencies = plain / found["rope_freqs"].data
    shape = Shape(
        key("llama.block_count"), key("llama.attention.head_count"), key("llama.attention.head_count_kv"),
        key("llama.attention.layer_norm_rms_epsilon"), frequencies, scale,
        is_interleaved=True, is_tied="output" not in found,
    )  # fmt: skip
    hf_names = {name: table.get_name(name.removesuffix(".weight")) for name in _all_names(config)}
    names = frozenset(name for name, theirs in hf_names.items() if theirs in found)
    unknown = set(found) - set(hf_names.values()) - {"rope_freqs"}
    return Readback(names | unknown, weight, shape, _gguf_encoder(reader), _gguf_names(reader), _gguf_roles(reader))


def _all_names(config: LlamaConfig) -> list[str]:
    inner = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")  # fmt: skip
    layers = [f"model.layers.{layer}.{name}.weight" for layer in range(config.num_layers) for name in inner]
    return ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", *layers]


def _gguf_names(reader: Any) -> Callable[[str], int | None] | None:
    field = reader.get_field("tokenizer.ggml.tokens")
    return None if field is None else {name: index for index, name in enumerate(field.contents())}.get


def _gguf_roles(reader: Any) -> dict[str, int | None]:
    fields = {role: reader.get_field(f"tokenizer.ggml.{role}_token_id") for role in _ROLES}
    return {role: None if field is None else int(field.contents()) for role, field in fields.items()}


def _gguf_encoder(reader: Any) -> Any:
    field = reader.get_field("tokenizer.ggml.tokens")
    if field is None:
        return None
    tokens = field.contents()
    kinds = reader.get_field("tokenizer.ggml.token_type").contents()
    if reader.get_field("tokenizer.ggml.model").contents() == "llama":
        scores = reader.get_field("tokenizer.ggml.scores").contents()
        adds_space = reader.get_field("tokenizer.ggml.add_space_prefix").contents()
        unknown = reader.get_field("tokenizer.ggml.unknown_token_id").contents()
        return PieceEncoder(tokens, scores, kinds, unknown, adds_space=adds_space)
    merges = [tuple(merge.split(" ")) for merge in reader.get_field("tokenizer.ggml.merges").contents()]
    return _byte_level(tokens, kinds, merges, reader.get_field("tokenizer.ggml.pre").contents())


def _byte_level(tokens: Sequence[str], kinds: Sequence[int], merges: list[tuple[str, str]], pre: str) -> Any:
    """Build what llama.cpp does for `gpt2` vocabularies from the package's parts."""
    normal = {token: index for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == 1}
    is_llama3 = pre == "llama-bpe"
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(normal, merges, ignore_merges=is_llama3))
    levels = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not is_llama3)
    if is_llama3:
        # llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_LLAMA3
        pattern = (
            r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, levels])
    else:
        backend.pre_tokenizer = levels
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def read_llama2c_folder(folder: Path, config: LlamaConfig) -> Readback:
    """Read `model.bin` by counting offsets and `tokenizer.bin` as llama2.c's program does."""
    raw = np.fromfile(folder / "model.bin", np.uint8)
    head = raw[:HEADER_BYTES].tobytes()
    if head[:4] == b"24ka":
        version, dim, hidden, layers, heads, kv_heads, vocab, length, tied, group = struct.unpack_from(
            "<i7iBi", head, 4
        )
        at = HEADER_BYTES
    else:
        dim, hidden, layers, heads, kv_heads, vocab, length = struct.unpack_from("<7i", head)
        version, tied, group, at, vocab = 0, vocab > 0, 0, 28, abs(vocab)
    width = dim // heads
    places: dict[str, tuple[int, tuple[int, ...], bool]] = {}
    for name, sizes in _llama2c_order(version, (dim, hidden, layers, kv_heads * width, vocab), (length, width)):
        count = int(np.prod(sizes))
        is_quantized = version == 2 and len(sizes) == 2
        places[name] = (at, sizes, is_quantized)
        at += count + 4 * count // group if is_quantized else 4 * count
    del places["rotary tables"]
    if tied:
        del places["lm_head.weight"]

    def weight(name: str) -> Array:
        start, sizes, is_quantized = places[name]
        count = int(np.prod(sizes))
        if not is_quantized:
            plain: Array = raw[start : start + 4 * count].view("<f4").reshape(sizes)
            return plain
        numbers = raw[start : start + count].view(np.int8).astype(np.float32).reshape(-1, group)
        scales = raw[start + count : start + count + 4 * count // group].copy().view("<f4")
        values: Array = (numbers * scales[:, None]).reshape(sizes)
        return values

    frequencies, scale = _frequencies(config, 10000.0, width)
    shape = Shape(layers, heads, kv_heads, 1e-5, frequencies, scale, is_interleaved=True, is_tied=bool(tied))
    return Readback(frozenset(places), weight, shape, _bin_encoder(folder / "tokenizer.bin"))


def _llama2c_order(
    version: int, widths: tuple[int, int, int, int, int], tables: tuple[int, int]
) -> list[tuple[str, tuple[int, ...]]]:
    dim, hidden, layers, kv_dim, vocab = widths

    def stack(name: str, *sizes: int) -> list[tuple[str, tuple[int, ...]]]:
        return [(f"model.layers.{n}.{name}.weight", sizes) for n in range(layers)]

    embedding, norm = [("model.embed_tokens.weight", (vocab, dim))], [("model.norm.weight", (dim,))]
    norms = stack("input_layernorm", dim), stack("post_attention_layernorm", dim)
    rows = {"q": dim, "k": kv_dim, "v": kv_dim, "o": dim}
    attention = [entry for name, size in rows.items() for entry in stack(f"self_attn.{name}_proj", size, dim)]
    matrices = {"gate": (hidden, dim), "down": (dim, hidden), "up": (hidden, dim)}
    mlp = [entry for name, sizes in matrices.items() for entry in stack(f"mlp.{name}_proj", *sizes)]
    last = [("rotary tables", tables if version == 0 else (0,)), ("lm_head.weight", (vocab, dim))]
    if version == 0:
        return [*embedding, *norms[0], *attention, *norms[1], *mlp, *norm, *last]
    return [*norms[0], *norms[1], *norm, *embedding, *attention, *mlp, *last]


def _bin_encoder(path: Path) -> Any:
    if not path.is_file():
        return None
    raw, at = path.read_bytes(), 4
    tokens: list[str] = []
    scores: list[float] = []
    while at < len(raw):
        score, length = struct.unpack_from("<fi", raw, at)
        scores.append(score)
        tokens.append(raw[at + 8 : at + 8 + length].decode("utf-8").replace(" ", "▁"))
        at += 8 + length
    kinds = [2, 3, 3, *([6] * 256 if "<0x00>" in tokens else [])]
    kinds += [1] * (len(tokens) - len(kinds))
    return PieceEncoder(tokens, scores, kinds, 0, adds_space=True)
