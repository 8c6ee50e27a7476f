"""One new token for each row, with as little as possible around the arithmetic.

A small model's token costs microseconds of arithmetic and, through modules and general operations, milliseconds of
calls. This step is the model's forward for T = 1 written flat: weights looked up once, one buffer for q, k and v,
which are turned in place, residual additions inside the matrix products, attention as two small products over the
cache. Same weights, same equations; `tests/infer/test_decode_step.py` sets it equal to the model. Where it does not
apply (adapters or quantized projections, half precision, a GPU) `next_logits` asks the model itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear, silu

from entrenar.model import KVCache, Llama
from entrenar.model.llama import Block, Linear

NextLogits = Callable[[Int[Tensor, "B 1"]], Float[Tensor, "B V"]]


def next_logits(model: Llama, cache: KVCache) -> NextLogits:
    """Return the fastest function that reads one token a row into the cache and gives the logits of the next."""
    if is_plain(model):
        return DecodeStep(model, cache)

    @torch.inference_mode()
    def step(tokens: Int[Tensor, "B 1"]) -> Float[Tensor, "B V"]:
        return model.logits(model.hidden(tokens, cache=cache))[:, -1]

    return step


def is_plain(model: Llama) -> bool:
    """Tell whether every projection is an unadapted matrix, in single or double precision on the CPU."""
    weight = model.model.embed_tokens.weight
    projections = [module for name, module in model.named_modules() if name.endswith("_proj")]
    return (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.float64)
        and model.compute_dtype in (None, weight.dtype)
        and all(type(module) is Linear for module in projections)
    )


@dataclass(frozen=True, eq=False, slots=True)
class _Layer:
    """Weights and cache of a block, in the shapes that one token needs."""

    attention_norm: Tensor  # (D,), times sqrt(D)
    q: Tensor  # (D, H·K)
    k: Tensor  # (D, G·K)
    v: Tensor  # (D, G·K)
    o: Tensor  # (H·K, D)
    mlp_norm: Tensor  # (D,), times sqrt(D)
    gate: Tensor  # (D, F)
    up: Tensor  # (D, F)
    down: Tensor  # (F, D)
    cache: Tensor  # (2, B, G, max_len, K)
    keys: Tensor  # (B·G, K, max_len)
    values: Tensor  # (B·G, max_len, K)


class DecodeStep:
    """Reads one token a row into the cache and returns the logits of the next."""

    def __init__(self, model: Llama, cache: KVCache) -> None:
        config = model.config
        self._cache = cache
        self._embedding, self._head = model.model.embed_tokens.weight.detach(), model.head_weight.detach()
        # A tensor: torch makes one of a number at each addition.
        self._eps = self._embedding.new_tensor([[config.rms_norm_eps * config.hidden_size]])
        self._final_norm = self._scaled(model.model.norm.weight)
        self._layers = [
            self._layer(cast(Block, block), memory)
            for block, memory in zip(model.model.layers, cache.layers, strict=True)
        ]
        self._scale = config.head_width**-0.5
        self._turns = self._signed_angles(model)
        self._bias = self._padding_bias()
        self._allocate_qkv(config.num_heads, config.kv_heads, config.head_width)

    @staticmethod
    def _scaled(norm: Tensor) -> Tensor:
        """Multiply a norm's weight by sqrt(D), so that the norm needs a sum of squares and no mean."""
        scaled: Tensor = norm.detach() * norm.shape[0] ** 0.5
        return scaled

    def _layer(self, block: Block, memory: Tensor) -> _Layer:
        attention, mlp = block.self_attn, block.mlp
        keys, values = memory.flatten(1, 2)  # (B·G, max_len, K)
        names = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        q, k, v, o = (projection.weight.detach().mT for projection in names)
        gate, up, down = (layer.weight.detach().mT for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        attention_norm = self._scaled(block.input_layernorm.weight)
        mlp_norm = self._scaled(block.post_attention_layernorm.weight)
        return _Layer(attention_norm, q, k, v, o, mlp_norm, gate, up, down, memory, keys.mT, values)

    def _signed_angles(self, model: Llama) -> tuple[Tensor, Tensor]:
        """Return cos, and sin with the sign of each half of a head, for each position: (P, 1, 2, K/2)."""
        cos, sin = model.rotary.rows(self._cache.max_len, self._embedding.device)
        return torch.stack((cos, cos), dim=1)[:, None], torch.stack((-sin, sin), dim=1)[:, None]

    def _padding_bias(self) -> Tensor | None:
        """Return what is added to the scores of left-padded rows: (B·G, 1, max_len), -inf before each row's text."""
        starts = self._cache.starts
        if starts is None:
            return None
        is_padding = torch.arange(self._cache.max_len) < starts[:, None]
        bias = torch.zeros(is_padding.shape, dtype=self._embedding.dtype).masked_fill(is_padding, -torch.inf)
        groups = self._cache.layers[0].shape[2]
        return bias.repeat_interleave(groups, dim=0)[:, None]

    def _allocate_qkv(self, heads: int, groups: int, width: int) -> None:
        """Make the buffer of one token's q, k and v, and the views through which it is written and read."""
        batch_size = self._cache.layers[0].shape[1]
        qkv = torch.empty(batch_size, heads + 2 * groups, width, dtype=self._embedding.dtype)
        turned = heads + groups
        self._q_out, self._k_out, self._v_out = (
            part.view(batch_size, -1) for part in (qkv[:, :heads], qkv[:, heads:turned], qkv[:, turned:])
        )
        self._turning = qkv[:, :turned].view(batch_size, turned, 2, width // 2)
        self._new_kv = qkv[:, heads:].view(batch_size, 2, groups, width).transpose(0, 1)  # (2, B, G, K)
        self._queries = qkv[:, :heads].view(batch_size, groups, heads // groups, width)
        self._no_bias = qkv.new_zeros(1, 1, 1)

    @torch.inference_mode()
    def __call__(self, tokens: Int[Tensor, "B 1"]) -> Float[Tensor, "B V"]:
        """Read `tokens` and return the logits of the tokens after them."""
        end = self._cache.end_after(1)
        cos, sin = self._angles(end - 1)
        bias = self._no_bias if self._bias is None else self._bias[:, :, :end]
        x = self._embedding.index_select(0, tokens.view(-1))  # (B, D)
        for layer in self._layers:
            normed = self._norm(x, layer.attention_norm)
            x = torch.addmm(x, self._attend(layer, normed, (cos, sin), bias, end), layer.o)
            normed = self._norm(x, layer.mlp_norm)
            gated = silu(torch.mm(normed, layer.gate), inplace=True).mul_(torch.mm(normed, layer.up))
            x = torch.addmm(x, gated, layer.down)
        self._cache.advance(1)
        return linear(self._norm(x, self._final_norm), self._head)

    def _angles(self, slot: int) -> tuple[Tensor, Tensor]:
        cos, sin = self._turns
        if self._cache.starts is None:
            return cos[slot], sin[slot]
        positions = slot - self._cache.starts
        return cos[positions], sin[positions]  # (B, 1, 2, K/2)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return (x * (x * x).sum(-1, keepdim=True).add_(self._eps).rsqrt_()).mul_(weight)

    def _attend(self, layer: _Layer, x: Tensor, turns: tuple[Tensor, Tensor], bias: Tensor, end: int) -> Tensor:
        cos, sin = turns
        torch.mm(x, layer.q, out=self._q_out)
        torch.mm(x, layer.k, out=self._k_out)
        torch.mm(x, layer.v, out=self._v_out)
        # y_a = a cos - b sin, y_b = b cos + a sin: flip swaps the halves, sin carries the signs
        self._turning.copy_(torch.addcmul(self._turning * cos, self._turning.flip(2), sin))
        layer.cache.select(3, end - 1).copy_(self._new_kv)
        queries = self._queries.flatten(0, 1)  # (B·G, H/G, K)
        scores = torch.baddbmm(bias, queries, layer.keys[:, :, :end], alpha=self._scale)  # (B·G, H/G, S)
        mixed = torch.bmm(scores.softmax(-1), layer.values[:, :end])  # (B·G, H/G, K)
        return mixed.view(x.shape[0], -1)
