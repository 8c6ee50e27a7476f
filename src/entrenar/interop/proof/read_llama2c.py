"""An independent reader of llama2.c's files, by counting offsets."""

import struct
from pathlib import Path
from typing import Any

import numpy as np

from entrenar.interop.llama2c import HEADER_BYTES
from entrenar.interop.proof.frequencies import frequencies
from entrenar.interop.proof.numpy_llama import Array, Shape
from entrenar.interop.proof.piece_encoder import PieceEncoder
from entrenar.interop.proof.readback import Readback


def read_llama2c(path: Path) -> Readback:
    """Read a `model.bin`, or the one in a folder, and the `tokenizer.bin` next to it."""
    file = path / "model.bin" if path.is_dir() else path
    raw = np.fromfile(file, np.uint8)
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

    found, scale = frequencies(10000.0, width, {})
    shape = Shape(layers, heads, kv_heads, 1e-5, found, scale, is_interleaved=True, is_tied=bool(tied))
    return Readback(frozenset(places), weight, shape, _bin_encoder(file.parent / "tokenizer.bin"))


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
