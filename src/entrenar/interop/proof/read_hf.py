"""An independent reader of Hugging Face folders: safetensors, NF4 and the other quantized layouts by hand."""

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from entrenar.interop.proof.frequencies import frequencies
from entrenar.interop.proof.numpy_llama import Array, Shape
from entrenar.interop.proof.readback import FileRows, Readback

_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "U8": "u1", "I8": "i1"}
_ROLES = ("bos", "eos")
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"

# A tensor's numbers as they are stored, by its name, from one place up to another.
Part = Callable[..., Array]
Places = Mapping[str, tuple[Path, Mapping[str, Any], int]]


def read_hf_folder(folder: Path) -> Readback:
    """Read weights, architecture and tokenizer of a folder."""
    written = json.loads((folder / "config.json").read_text("utf-8"))
    places = _places(folder)

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

    names = frozenset(name for name in places if name.endswith(".weight"))
    unknown = {name for name in places if ".weight." in name and name.partition(".weight.")[0] + ".weight" not in names}
    quantization = written.get("quantization_config", {})
    return Readback(
        names | unknown, lambda name: _rows(places, name, part, quantization), _shape(written), *_tokenizer(folder)
    )


def _places(folder: Path) -> Places:
    """Return where each tensor is: in the single file if there is one (as in transformers), else in the shards."""
    files = [folder / _SINGLE]
    if not files[0].is_file():
        files = sorted(
            {folder / name for name in json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"].values()}
        )
    places: dict[str, tuple[Path, Mapping[str, Any], int]] = {}
    for path in files:
        with path.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
        places |= {name: (path, entry, 8 + size) for name, entry in header.items() if name != "__metadata__"}
    return places


def _rows(places: Places, name: str, part: Part, quantization: Mapping[str, Any]) -> FileRows:
    state = f"{name}.quant_state.bitsandbytes__nf4"
    if state in places:
        shape = tuple(json.loads(part(state).tobytes())["shape"])
        return FileRows(shape, _nf4_numbers(lambda kind, *span: part(f"{name}{kind}", *span)))
    if f"{name}.row_absmax" in places:
        return _int8_rows(tuple(places[name][1]["shape"]), lambda kind, *span: part(f"{name}{kind}", *span))
    if f"{name}.scales" in places:
        return _bits_rows(places, name, part, quantization)
    return FileRows(tuple(places[name][1]["shape"]), lambda start, stop: part(name, start, stop))


def _shape(written: Mapping[str, Any]) -> Shape:
    """Read the architecture, with the defaults of transformers for the keys that some writers leave out."""
    heads = written["num_attention_heads"]
    rope = {**(written.get("rope_parameters") or {}), **(written.get("rope_scaling") or {})}
    rope = {"original_max_position_embeddings": written.get("max_position_embeddings", 2048)} | {
        key: value for key, value in rope.items() if value is not None
    }
    if written.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = written["original_max_position_embeddings"]
    theta = rope.get("rope_theta") or written.get("rope_theta") or 10000.0
    width = written.get("head_dim") or written["hidden_size"] // heads
    found, scale = frequencies(theta, width, rope)
    return Shape(
        written["num_hidden_layers"], heads, written.get("num_key_value_heads") or heads,
        written.get("rms_norm_eps", 1e-6), found, scale,
        is_interleaved=False, is_tied=bool(written.get("tie_word_embeddings")),
    )  # fmt: skip


def _tokenizer(folder: Path) -> tuple[Any, Callable[[str], int | None] | None, dict[str, int | None]]:
    """Return what encodes a text, what finds a token, and the tokens that begin and end a text."""
    if not (folder / "tokenizer.json").is_file():
        return None, None, {}
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.encode_special_tokens = True
    id_of = backend.token_to_id
    beside = folder / "tokenizer_config.json"
    said = json.loads(beside.read_text("utf-8")) if beside.is_file() else {}
    tokens = {role: said.get(f"{role}_token") or "" for role in _ROLES}
    roles = {role: id_of(token["content"] if isinstance(token, dict) else token) for role, token in tokens.items()}
    return lambda text: backend.encode(text, add_special_tokens=False).ids, id_of, roles


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
