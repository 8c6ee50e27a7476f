"""The LLaMA, in one straight line (Touvron et al. 2023, arXiv:2307.09288).

    x = embedding of the tokens
    each block:  x = x + o(attention(rope(q(n)), rope(k(n)), v(n)))     n = RMSNorm(x)
                 x = x + down(silu(gate(n)) · up(n))                    n = RMSNorm(x)
    logits = head(RMSNorm(x))

Weight names are Hugging Face's, so a state dict of LlamaForCausalLM loads unchanged. A tied head is no parameter of its
own: it is read from the embedding, so it cannot come apart when weights are moved, and a file holds it once. Every
projection is called as a module, so that an adapter can take its place.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from entrenar import ops
from entrenar.errors import DataError, FormatError
from entrenar.model.config import Checkpointing, LlamaConfig
from entrenar.model.kv_cache import KVCache
from entrenar.model.recompute import recomputed
from entrenar.model.rope_scaling import RotaryTable
from entrenar.model.streaming import LayerStream, Stream
from entrenar.model.token_check import AskedTargets, check_token_ids


@dataclass(frozen=True, eq=False)
class Context:
    """The context of the tokens: their rotary angles, their documents, the tokens before them."""

    cos: Float[Tensor, "#B T half"]
    sin: Float[Tensor, "#B T half"]
    documents: ops.Documents | None = None
    cache: KVCache | None = None
    mask: Bool[Tensor, "B 1 T S"] | None = None
    checkpointing: Checkpointing = "none"
    compute_dtype: torch.dtype | None = None
    stream: Stream | None = None


class RMSNorm(nn.Module):
    """A weight for `ops.rms_norm`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Normalize each token."""
        return ops.rms_norm(x, self.weight, self.eps)


class Linear(nn.Module):
    """A weight for `ops.linear`, without a bias.

    Attributes:
        compute_dtype: what the product is computed in; None for the dtype of the weight.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.compute_dtype: torch.dtype | None = None

    def forward(self, x: Float[Tensor, "... I"]) -> Float[Tensor, "... O"]:
        """Multiply each token by the weight."""
        return ops.linear(x, self.weight, self.compute_dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_width = config.head_width
        queries, keys = config.num_heads * config.head_width, config.kv_heads * config.head_width
        self.q_proj = Linear(config.hidden_size, queries)
        self.k_proj = Linear(config.hidden_size, keys)
        self.v_proj = Linear(config.hidden_size, keys)
        self.o_proj = Linear(queries, config.hidden_size)

    def forward(
        self, x: Float[Tensor, "B T D"], context: Context, asked: Int[Tensor, " N"] | None = None
    ) -> Float[Tensor, "rows times D"]:
        """Mix each token with those before it; with `asked`, compute only those tokens, as one row."""
        heads = (*x.shape[:2], -1, self.head_width)
        q = self.q_proj(x).view(heads).transpose(1, 2)  # (B, H, T, K)
        k = self.k_proj(x).view(heads).transpose(1, 2)  # (B, G, T, K)
        v = self.v_proj(x).view(heads).transpose(1, 2)  # (B, G, T, K)
        q, k = ops.rope(q, context.cos, context.sin), ops.rope(k, context.cos, context.sin)
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v)  # (B, G, S, K)
        if context.mask is not None:
            mixed = scaled_dot_product_attention(q, k, v, attn_mask=context.mask, enable_gqa=q.shape[1] != k.shape[1])
        else:
            mixed = ops.attention(q, k, v, documents=context.documents, compute_dtype=context.compute_dtype)
        out: Tensor = self.o_proj(_select(mixed.transpose(1, 2).flatten(2), asked))
        return out


class MLP(nn.Module):
    """The gated feed-forward layer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """Transform each token by itself."""
        out: Tensor = self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x)))
        return out


class Block(nn.Module):
    """Attention and MLP, each behind a norm and around a residual."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Float[Tensor, "B T D"], context: Context, asked: Int[Tensor, " N"] | None = None
    ) -> Float[Tensor, "rows times D"]:
        """Run the block; its widest activations are the MLP's, and "selective" recomputes them in the backward.

        With `asked` (indices of B·T), return the states of those tokens alone, as one row: what follows attention
        works on each token by itself, so the others need only be seen.
        """
        x = _select(x, asked) + self.self_attn(self.input_layernorm(x), context, asked)
        is_selective = context.checkpointing == "selective"
        return x + (recomputed(self._mlp_half, x) if is_selective else self._mlp_half(x))

    def _mlp_half(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Embedding, blocks and final norm: everything but the head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        # Its own draw is not wanted, and on the meta device would import the compiler: 3 s of each load.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(weight, freeze=False)  # type: ignore[no-untyped-call]
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, input_ids: Int[Tensor, "B T"], context: Context, asked: Int[Tensor, " N"] | None = None
    ) -> Float[Tensor, "rows times D"]:
        """Return the final hidden state of each token, or of the `asked` ones as one row."""
        return self.blocks_and_norm(self.embed_tokens(input_ids), 0, context, asked)

    def blocks(
        self, x: Float[Tensor, "B T D"], context: Context, start: int = 0, stop: int | None = None
    ) -> Float[Tensor, "B T D"]:
        """Run the blocks from `start` up to `stop`; "full" recomputes each in the backward."""
        for block in self.layers[start:stop]:
            x = _run(block, x, context)
        return x

    def blocks_and_norm(
        self, x: Float[Tensor, "B T D"], start: int, context: Context, asked: Int[Tensor, " N"] | None
    ) -> Float[Tensor, "rows times D"]:
        """Run the blocks from `start` on and the norm; the last block computes only the `asked` tokens."""
        x = self.blocks(x, context, start, -1)
        last = self.layers[max(start, len(self.layers) - 1) :]
        x = _run(last[0], x, context, asked) if last else _select(x, asked)
        out: Tensor = self.norm(x)
        return out


def _run(block: nn.Module, x: Tensor, context: Context, asked: Tensor | None = None) -> Tensor:
    layer, stream = cast(Block, block).self_attn.layer, context.stream
    if stream is not None:
        stream.begin(layer)
    if context.checkpointing == "full":
        out = recomputed(lambda x: cast(Tensor, block(x, context, asked)), x)
    else:
        out = block(x, context, asked)
    if stream is not None:
        stream.end(layer, out)
    return out


def _select(x: Float[Tensor, "B T D"], asked: Int[Tensor, " N"] | None) -> Float[Tensor, "rows times D"]:
    """Return the tokens that are asked for as one row, all as they are if none is named."""
    return x if asked is None else x.flatten(0, 1).index_select(0, asked)[None]


class Llama(nn.Module):
    """A LLaMA with its head.

    Attributes:
        config: the architecture.
        checkpointing: which activations training recomputes in the backward instead of keeping them.
        compute_dtype: what matrix products are computed in, whatever weights and activations are stored in; None for
            the stored dtype. Set by `set_compute_dtype`.
        stream: brings frozen layers from their file and lets them go. Set by `stream_base`.
        generation: the content of the `generation_config.json` that came with the weights, kept for other programs.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing: Checkpointing = "none"
        self.compute_dtype: torch.dtype | None = None
        self.stream: Stream | None = None
        self.generation: Mapping[str, Any] = {}
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.rotary = RotaryTable(config)
        self.register_load_state_dict_pre_hook(_drop_tied_head)  # type: ignore[no-untyped-call]  # torch's own

    def set_compute_dtype(self, dtype: torch.dtype | None) -> None:
        """Compute every matrix product in `dtype`; `ops.fastest_compute_dtype` says which pays on this machine."""
        self.compute_dtype = dtype
        for module in self.modules():
            if module is not self and hasattr(module, "compute_dtype"):  # a projection, also one in an adapter's hands
                cast(Linear, module).compute_dtype = dtype

    def stream_base(self) -> None:
        """Keep no more of the frozen layers in memory than is being used.

        Raises: ConfigError when none is mapped from a file.
        """
        self.stream = LayerStream(list(self.model.layers))

    @property
    def head_weight(self) -> Float[Tensor, "V D"] | ops.QuantizedWeight:
        """The head's weight in its stored form; a tied model reads it from its embedding."""
        head = self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        quantized: ops.QuantizedWeight | None = getattr(head, "quantized", None)
        return head.weight if quantized is None else quantized

    @property
    def device(self) -> torch.device:
        """Where tokens are taken."""
        return self.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states and logits: the embedding's, for norms may be wider."""
        embedding = self.model.embed_tokens
        stands_for: torch.dtype | None = getattr(embedding, "dtype", None)  # a quantized one has no plain weight
        return embedding.weight.dtype if stands_for is None else stands_for

    def hidden(
        self, input_ids: Int[Tensor, "B T"], *, documents: ops.DocumentSpans | None = None, cache: KVCache | None = None
    ) -> Float[Tensor, "B T D"]:
        """Return the final hidden state of each token, after the last norm.

        `documents` are the half-open spans of the documents in each row: no token sees another document, and
        positions restart with each. A `cache` holds the tokens before these, and grows by them.
        """
        check_token_ids(input_ids, self.config.vocab_size, None, documents)
        context = self._context(input_ids, documents, cache)
        out: Tensor = self.model(input_ids, context)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return out

    def hidden_below(
        self, input_ids: Int[Tensor, "B T"], layer: int, *, documents: ops.DocumentSpans | None = None
    ) -> Float[Tensor, "B T D"]:
        """Return the state of each token as it enters block `layer`."""
        context = self._context(input_ids, documents, None)
        return self.model.blocks(self.model.embed_tokens(input_ids), context, stop=layer)

    def through(self, x: Float[Tensor, "B T D"], start: int, stop: int) -> Float[Tensor, "B T D"]:
        """Return the state of each token after block `stop - 1`, going on from the state that enters block `start`."""
        return self.model.blocks(x, self._context(x, None, None), start, stop)

    def loss_from(
        self,
        x: Float[Tensor, "B T D"],
        layer: int,
        targets: Int[Tensor, "B T"],
        *,
        documents: ops.DocumentSpans | None = None,
    ) -> Float[Tensor, ""]:
        """Return `loss`, going on from the state that enters block `layer`."""
        asked = AskedTargets.find(targets, self.config.vocab_size, x.device)
        hidden = self.model.blocks_and_norm(x, layer, self._context(x, documents, None), asked.places)
        return self._loss_of_hidden(hidden, asked)

    def logits(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T V"]:
        """Apply the head."""
        weight = self.head_weight
        if isinstance(weight, Tensor):
            return ops.linear(hidden, weight, self.compute_dtype)
        return ops.quantized_linear(hidden, weight, compute_dtype=self.compute_dtype)

    def forward(
        self, input_ids: Int[Tensor, "B T"], *, documents: ops.DocumentSpans | None = None, cache: KVCache | None = None
    ) -> Float[Tensor, "B T V"]:
        """Return the logits of the token after each token."""
        return self.logits(self.hidden(input_ids, documents=documents, cache=cache))

    def loss(
        self, input_ids: Int[Tensor, "B T"], targets: Int[Tensor, "B T"], *, documents: ops.DocumentSpans | None = None
    ) -> Float[Tensor, ""]:
        """Return the cross entropy summed over the targets that are not -100; targets[t] is the token after input t.

        Targets may stay on the host while the ids are on a device: then the device is not asked which are -100.
        """
        check_token_ids(input_ids, self.config.vocab_size, targets, documents)
        asked = AskedTargets.find(targets, self.config.vocab_size, input_ids.device)
        hidden = self.model(input_ids, self._context(input_ids, documents, None), asked.places)
        return self._loss_of_hidden(hidden, asked)

    def _loss_of_hidden(self, hidden: Tensor, asked: AskedTargets) -> Tensor:
        return ops.linear_cross_entropy(
            hidden.flatten(0, 1),
            self.head_weight,
            asked.ids,
            compute_dtype=self.compute_dtype,
            is_checked=asked.are_checked,
        )

    def init_weights(self, generator: torch.Generator) -> None:
        """Draw all weights: normal with deviation `initializer_range`, norms one.

        Projections that write to the residual stream (o_proj, down_proj) get 1/sqrt(2L) times that, so that the sum of
        2L branches keeps its size (Radford 2019, GPT-2, section 2.3). The draw is float32 on the generator's device,
        in the order of the state dict: the same weights for every dtype and device, up to rounding.
        """
        deviation = self.config.initializer_range
        residual_deviation = deviation / (2 * self.config.num_layers) ** 0.5
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if name.endswith("norm.weight"):
                    weight.fill_(1.0)
                    continue
                is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                draw = torch.empty(weight.shape, dtype=torch.float32, device=generator.device)
                weight.copy_(draw.normal_(0.0, residual_deviation if is_residual else deviation, generator=generator))

    def _context(self, tokens: Tensor, documents: ops.DocumentSpans | None, cache: KVCache | None) -> Context:
        if cache is not None:
            if documents is not None:
                raise DataError("documents and a key/value cache exclude each other: a cache holds one document a row")
            return self._cached_context(tokens, cache)
        checkpointing = self.checkpointing if torch.is_grad_enabled() else "none"
        if documents is not None:
            placed = ops.Documents.from_spans(documents, tokens.device)
            cos, sin = self.rotary.of_documents(placed)
        else:
            placed, num_tokens = None, tokens.shape[1]
            cos, sin = (table[None, :num_tokens] for table in self.rotary.rows(num_tokens, tokens.device))
        return Context(
            cos, sin, placed, checkpointing=checkpointing, compute_dtype=self.compute_dtype, stream=self.stream
        )

    def _cached_context(self, input_ids: Tensor, cache: KVCache) -> Context:
        start, end = cache.length, cache.end_after(input_ids.shape[1])
        # One base of the rotation for the whole life of a cache: keys turned by another would no longer fit.
        cos, sin = self.rotary.rows(cache.max_len, input_ids.device)
        if cache.starts is None:
            return Context(cos[None, start:end], sin[None, start:end], cache=cache)
        slots = torch.arange(end, device=input_ids.device)
        positions = (slots[start:] - cache.starts[:, None]).clamp(min=0)
        is_text = slots >= cache.starts[:, None]  # (B, S)
        if start == 0:
            # The padding is a document of its own: a query with no key at all would be NaN.
            padding = ops.Documents.from_spans(cache.spans(end), input_ids.device)
            return Context(cos[positions], sin[positions], padding, cache)
        mask = (is_text[:, None] & (slots <= slots[start:, None]))[:, None]  # (B, 1, T, S)
        return Context(cos[positions], sin[positions], cache=cache, mask=mask)


def _drop_tied_head(module: Llama, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Take `lm_head.weight` out of a tied model's state dict: Hugging Face keeps the embedding there a second time."""
    head_name, embedding_name = f"{prefix}lm_head.weight", f"{prefix}model.embed_tokens.weight"
    if not module.config.tie_word_embeddings or head_name not in state_dict:
        return
    head = state_dict.pop(head_name)
    embedding = state_dict.setdefault(embedding_name, head)
    if head.data_ptr() != embedding.data_ptr() and not torch.equal(head, embedding):
        raise FormatError(
            f"{head_name} must equal {embedding_name}, because the config ties them; "
            "set tie_word_embeddings to false to keep both"
        )
