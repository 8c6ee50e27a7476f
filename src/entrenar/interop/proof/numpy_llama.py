"""A LLaMA's forward pass in numpy, for checking files; it shares no code with the model that wrote them.

It takes weights by name from a reader, one layer at a time, in the order of rows that the file has, so a wrong
permutation, a transposed matrix, a lost scaling or a swapped gate shows in the logits. Float64, no cache, no speed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
_HEAD_ROWS = 4096


class Rows(Protocol):
    """A matrix, in memory or read from a file row by row."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""

    def __getitem__(self, index: Any, /) -> Array:
        """Return rows."""


Weights = Callable[[str], Rows]


@dataclass(frozen=True)
class Shape:
    """The inputs of a forward pass besides the weights; `frequencies` holds one value per plane of a head."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    eps: float
    frequencies: Array
    rotary_scale: float
    is_interleaved: bool
    is_tied: bool


def logits(weights: Weights, shape: Shape, input_ids: Array) -> Array:
    """Return the logits (B, T, V) of `input_ids` (B, T)."""
    x = weights("model.embed_tokens.weight")[input_ids].astype(np.float64)
    angles = np.arange(input_ids.shape[1])[:, None] * shape.frequencies.astype(np.float64)
    cos, sin = np.cos(angles) * shape.rotary_scale, np.sin(angles) * shape.rotary_scale
    for layer in range(shape.num_layers):

        def weight(name: str, layer: int = layer) -> Array:
            return weights(f"model.layers.{layer}.{name}.weight")[:].astype(np.float64)

        x = x + _attention(weight, shape, _norm(x, weight("input_layernorm"), shape.eps), cos, sin)
        h = _norm(x, weight("post_attention_layernorm"), shape.eps)
        gate = h @ weight("mlp.gate_proj").T
        gated = gate / (1 + np.exp(-np.clip(gate, -700, None))) * (h @ weight("mlp.up_proj").T)
        x = x + gated @ weight("mlp.down_proj").T
    head = weights("model.embed_tokens.weight" if shape.is_tied else "lm_head.weight")
    x = _norm(x, weights("model.norm.weight")[:], shape.eps)
    out = np.empty((*input_ids.shape, head.shape[0]))
    for start in range(0, head.shape[0], _HEAD_ROWS):  # the largest matrix of all
        out[..., start : start + _HEAD_ROWS] = x @ head[start : start + _HEAD_ROWS].T
    return out


def _norm(x: Array, weight: Array, eps: float) -> Array:
    out: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight
    return out


def _attention(weight: Callable[[str], Array], shape: Shape, x: Array, cos: Array, sin: Array) -> Array:
    rows, length, _ = x.shape
    q, k, v = (
        (x @ weight(f"self_attn.{name}_proj").T).reshape(rows, length, heads, -1)
        for name, heads in (("q", shape.num_heads), ("k", shape.num_kv_heads), ("v", shape.num_kv_heads))
    )
    q, k = (_turn(heads, cos, sin, is_interleaved=shape.is_interleaved) for heads in (q, k))
    k, v = (np.repeat(heads, shape.num_heads // shape.num_kv_heads, axis=2) for heads in (k, v))
    scores = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    mixed = np.einsum("bhts,bshk->bthk", shares, v).reshape(rows, length, -1)
    out: Array = mixed @ weight("self_attn.o_proj").T
    return out


def _turn(x: Array, cos: Array, sin: Array, *, is_interleaved: bool) -> Array:
    cos, sin = cos[:, None], sin[:, None]  # over the heads
    if is_interleaved:
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
