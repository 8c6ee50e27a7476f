"""Decode one new token a row with as little as possible around the arithmetic.

A small model's token costs microseconds of arithmetic and, through modules and general operations, milliseconds of
calls. This step is the model's forward for T = 1 written flat: weights are looked up once, every result goes into
memory allocated once, residual additions happen inside the matrix products, attention is two small products over the
cache. Products and softmax are torch's; element-wise work is numpy's, on the same memory, because a numpy call costs a
third of a torch call. Weights and equations are the same; `tests/infer/test_decode_step.py` sets it equal to the model.
Where it does not apply (adapters or quantized projections, half precision, a GPU) `next_logits` asks the model itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import silu

from entrenar.model import KVCache, Llama, LlamaConfig
from entrenar.model.llama import Block, Linear
from entrenar.train.pieces import has_pieces

NextLogits = Callable[[Int[Tensor, "B 1"]], Float[Tensor, "B V"]]
Array = np.ndarray[Any, np.dtype[Any]]


def next_logits(model: Llama, cache: KVCache, head: Callable[[Tensor], Tensor] | None = None) -> NextLogits:
    """Return the fastest function that reads one token a row into the cache and returns the logits of the next.

    `head` takes the place of the product with a quantized head.
    """
    if is_plain(model):
        return DecodeStep(model, cache)

    @torch.inference_mode()
    def step(tokens: Int[Tensor, "B 1"]) -> Float[Tensor, "B V"]:
        hidden = model.hidden(tokens, cache=cache)
        return (model.logits(hidden) if head is None else head(hidden))[:, -1]

    return step


def is_plain(model: Llama) -> bool:
    """Return whether every weight is an unadapted whole matrix, in single or double precision on the CPU."""
    projections = [module for name, module in model.named_modules() if name.endswith("_proj")]
    return (
        model.device.type == "cpu"
        and not has_pieces(model)
        and model.dtype in (torch.float32, torch.float64)
        and model.compute_dtype in (None, model.dtype)
        and all(type(module) is Linear for module in projections)
        and isinstance(model.head_weight, Tensor)
        and hasattr(model.model.embed_tokens, "weight")
    )


@dataclass(frozen=True, eq=False, slots=True)
class _Layer:
    """The weights of a block, in the shapes that one token needs."""

    attention_norm: Array  # (D,), times sqrt(D)
    q: Tensor  # (D, H·K)
    k: Tensor  # (D, G·K)
    v: Tensor  # (D, G·K)
    o: Tensor  # (H·K, D)
    mlp_norm: Array  # (D,), times sqrt(D)
    gate: Tensor  # (D, F)
    up: Tensor  # (D, F)
    down: Tensor  # (F, D)


@dataclass(frozen=True, eq=False, slots=True)
class _Attention:
    """The inputs that all layers' attention shares for a token; S tokens are in the cache, this one included."""

    cos: Array  # (#B, 1, 2, K/2)
    sin: Array  # the same, with the sign of each half of a head
    bias: Tensor | None  # (B·G, 1, S), -inf before the text of left-padded rows
    scores: Tensor  # (B·G, H/G, S)
    shares: Tensor  # (B·G, H/G, S)


class DecodeStep:
    """Reads one token a row into the cache and returns the logits of the next."""

    def __init__(self, model: Llama, cache: KVCache) -> None:
        config = model.config
        self._cache = cache
        self._embedding = model.model.embed_tokens.weight.detach()
        self._head = cast(Tensor, model.head_weight).detach().mT
        self._final_norm = _scaled(model.model.norm.weight)
        self._layers = [_layer(cast(Block, block)) for block in model.model.layers]
        self._scale = config.head_width**-0.5
        cos, sin = (turn.numpy() for turn in model.rotary.rows(cache.max_len, self._embedding.device))
        self._cos, self._sin = np.stack((cos, cos), axis=1)[:, None], np.stack((-sin, sin), axis=1)[:, None]
        self._bias = self._padding_bias()
        self._slots = _halved(cache.layers)  # (L, 2, B, G, max_len, 2, K/2)
        keys, values = cache.layers.flatten(2, 3).unbind(1)  # (L, B·G, max_len, K)
        self._keys, self._values = keys.mT, values
        self._allocate(config, cache.layers.shape[2])

    def _allocate(self, config: LlamaConfig, rows: int) -> None:
        """Allocate memory for a token's intermediate results, and the views that write and read it."""
        heads, groups, width = config.num_heads, config.kv_heads, config.head_width
        empty = self._embedding.new_empty
        self._x, self._normed = empty(rows, config.hidden_size), empty(rows, config.hidden_size)
        self._x_array, self._normed_array = self._x.numpy(), self._normed.numpy()
        self._lengths = np.empty_like(self._x_array[:, :1])
        self._eps = self._lengths.dtype.type(config.rms_norm_eps * config.hidden_size)
        self._gate, self._up = empty(rows, config.intermediate_size), empty(rows, config.intermediate_size)
        self._gate_array, self._up_array = self._gate.numpy(), self._up.numpy()
        qkv, turned = empty(rows, heads + 2 * groups, width), heads + groups
        self._q_out, self._k_out, self._v_out = (
            part.view(rows, -1) for part in (qkv[:, :heads], qkv[:, heads:turned], qkv[:, turned:])
        )
        halves = _halved(qkv)  # (B, H + 2G, 2, K/2)
        self._turning, self._new_values = halves[:, :turned], halves[:, turned:]
        self._swapped = self._turning[:, :, ::-1]
        self._by_cos, self._by_sin = np.empty_like(self._turning), np.empty_like(self._turning)
        queries = empty(rows, heads, width)
        self._turned_queries, self._queries = _halved(queries), queries.view(rows * groups, heads // groups, width)
        self._mixed = empty(rows * groups, heads // groups, width)
        self._mixed_rows = self._mixed.view(rows, -1)
        self._scores, self._shares = (empty(rows * heads * self._cache.max_len) for _ in range(2))

    def _padding_bias(self) -> Tensor | None:
        """Return the bias on the scores of left-padded rows: (B·G, 1, max_len), -inf before each row's text."""
        starts = self._cache.starts
        if starts is None:
            return None
        is_padding = torch.arange(self._cache.max_len) < starts[:, None]
        bias = torch.zeros(is_padding.shape, dtype=self._embedding.dtype).masked_fill(is_padding, -torch.inf)
        groups = self._cache.layers.shape[3]
        return bias.repeat_interleave(groups, dim=0)[:, None]

    @torch.inference_mode()
    @np.errstate(all="ignore")  # infinities pass, as in torch
    def __call__(self, tokens: Int[Tensor, "B 1"]) -> Float[Tensor, "B V"]:
        """Read `tokens` and return the logits of the tokens after them."""
        end = self._cache.end_after(1)
        attention = self._attention(end)
        x, normed, gate, up = self._x, self._normed, self._gate, self._up
        keys, values = self._keys[..., :end].unbind(0), self._values[:, :, :end].unbind(0)
        torch.index_select(self._embedding, 0, tokens.view(-1), out=x)
        for layer, slot, k, v in zip(self._layers, self._slots[:, :, :, :, end - 1], keys, values, strict=True):
            self._norm(layer.attention_norm)
            self._project(layer, attention, slot)
            self._mix(attention, k, v)
            x.addmm_(self._mixed_rows, layer.o)
            self._norm(layer.mlp_norm)
            torch.mm(normed, layer.gate, out=gate)
            torch.mm(normed, layer.up, out=up)
            silu(gate, inplace=True)
            np.multiply(self._gate_array, self._up_array, self._gate_array)
            x.addmm_(gate, layer.down)
        self._cache.advance(1)
        self._norm(self._final_norm)
        return torch.mm(normed, self._head)

    def _attention(self, end: int) -> _Attention:
        starts = self._cache.starts
        positions = slice(end - 1, end) if starts is None else end - 1 - starts.numpy()
        shape = (self._mixed.shape[0], self._mixed.shape[1], end)
        size = shape[0] * shape[1] * end
        return _Attention(
            self._cos[positions],
            self._sin[positions],
            None if self._bias is None else self._bias[:, :, :end],
            self._scores[:size].view(shape),
            self._shares[:size].view(shape),
        )

    def _norm(self, weight: Array) -> None:
        """Write the normed x."""
        x, lengths, out = self._x_array, self._lengths, self._normed_array
        np.vecdot(x, x, lengths[:, 0])
        np.add(lengths, self._eps, lengths)
        np.sqrt(lengths, lengths)
        np.divide(x, lengths, out)
        np.multiply(out, weight, out)

    def _project(self, layer: _Layer, attention: _Attention, slot: Array) -> None:
        """Write the turned queries, and the turned key and the value into their slot of the cache."""
        normed, by_cos, by_sin, queries = self._normed, self._by_cos, self._by_sin, self._turned_queries
        torch.mm(normed, layer.q, out=self._q_out)
        torch.mm(normed, layer.k, out=self._k_out)
        torch.mm(normed, layer.v, out=self._v_out)
        # y_a = a cos - b sin, y_b = b cos + a sin: the halves are swapped, sin carries the signs
        np.multiply(self._turning, attention.cos, by_cos)
        np.multiply(self._swapped, attention.sin, by_sin)
        heads = queries.shape[1]
        np.add(by_cos[:, :heads], by_sin[:, :heads], queries)
        np.add(by_cos[:, heads:], by_sin[:, heads:], slot[0])
        np.copyto(slot[1], self._new_values)

    def _mix(self, attention: _Attention, keys: Tensor, values: Tensor) -> None:
        """Write what each head takes from the values."""
        scores = attention.scores
        # beta 0 where there is no bias: whatever is in the scores counts nothing
        bias, beta = (scores, 0) if attention.bias is None else (attention.bias, 1)
        torch.baddbmm(bias, self._queries, keys, beta=beta, alpha=self._scale, out=scores)
        torch.softmax(scores, -1, out=attention.shares)
        torch.bmm(attention.shares, values, out=self._mixed)


def _halved(heads: Tensor) -> Array:
    """View the width of each head as its two halves."""
    view: Array = heads.view(*heads.shape[:-1], 2, -1).numpy()
    return view


def _scaled(norm: Tensor) -> Array:
    """Multiply a norm's weight by sqrt(D), so that the norm needs a sum of squares and no mean."""
    scaled: Array = (norm.detach() * norm.shape[0] ** 0.5).numpy()
    return scaled


def _layer(block: Block) -> _Layer:
    attention, mlp = block.self_attn, block.mlp
    names = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    q, k, v, o = (projection.weight.detach().mT for projection in names)
    gate, up, down = (layer.weight.detach().mT for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    attention_norm, mlp_norm = _scaled(block.input_layernorm.weight), _scaled(block.post_attention_layernorm.weight)
    return _Layer(attention_norm, q, k, v, o, mlp_norm, gate, up, down)
