"""Prove a written file: read it back by foreign code, compare every weight, the logits and the tokenizer.

The weights must be within what the format's rounding allows, block by block. The logits of the file are computed by a
forward pass that shares nothing with the model (`numpy_llama`), those of the source by the model itself; where no
weight was rounded they must agree. KL is KL(source ‖ file), in nats a token.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from entrenar.data import Tokenizer
from entrenar.errors import GateFailed
from entrenar.interop.proof.bounds import Bound
from entrenar.interop.proof.numpy_llama import Array, logits
from entrenar.interop.proof.readback import Readback
from entrenar.model import Llama, LlamaConfig

_PROBE_ROWS, _PROBE_LENGTH, _PROBE_SEED = 4, 64, 0
# Two float32 summations of the same product differ by this much of the largest logit, at most.
_SAME_LOGITS = 1e-3
_NUM_PIECES = 200
_COMPARED_AT_ONCE = 1 << 22
HARD_STRINGS = (
    "", " ", "  ", "a", " a", "a ", "  two  spaces  ", "\n", "\n\n\n", "\t\ttabs", "a\r\nb", "Hello, world!",
    "don't can't I'll we've", "3.14159 1000000 0x1F", "def f(x):\n    return x ** 2\n", "naïve café Ünïcödé",
    "漢字かなカナ한국어", "Привет мир", "مرحبا بالعالم", "🙂👩‍👩‍👧‍👦🏳️‍🌈", "e\u0301 \u200b\ufeff",
    "<s></s><unk><|eot_id|>",
    "▁ leading mark", "\x00\x01\x7f", "a" * 34, " " * 33, "ThisIsCamelCase_and_snake",
    "https://example.org/?q=1&r=%20", "½ ² ﬁ Ａ", "…—“”‘’",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """The results of a verification.

    Attributes:
        max_logit_difference: largest |difference| of a logit over the probe tokens.
        kl: mean over the probe tokens; `max_kl` the largest.
        top1: share of probe tokens whose likeliest next token is the same.
        tensor_errors: largest |difference| of each weight.
        num_strings: hard strings that the tokenizers were compared on, 0 without tokenizer.
        differing_strings: those with other ids.
    """

    max_logit_difference: float
    kl: float
    max_kl: float
    top1: float
    tensor_errors: Mapping[str, float]
    num_strings: int
    differing_strings: Sequence[str]

    @property
    def metrics(self) -> dict[str, float]:
        """The numbers that a threshold can be set on."""
        return {
            "kl": self.kl,
            "max_kl": self.max_kl,
            "dlogit": self.max_logit_difference,
            "top1": self.top1,
            "tensor_error": max(self.tensor_errors.values()),
        }

    def lines(self) -> list[str]:
        """Return the report for people."""
        worst = max(self.tensor_errors, key=lambda name: self.tensor_errors[name])
        same = self.num_strings - len(self.differing_strings)
        return [
            f"tensors       {len(self.tensor_errors)} read back, max |error| {self.tensor_errors[worst]:.3g} ({worst})",
            f"logits        max |difference| {self.max_logit_difference:.3g}, top-1 agreement {self.top1:.2%}",
            f"KL            mean {self.kl:.3g}, max {self.max_kl:.3g} nats a token",
            f"tokenizer     {same} of {self.num_strings} strings have the same ids"
            if self.num_strings
            else "tokenizer     none",
            *(f"              differs: {text!r}" for text in self.differing_strings[:5]),
        ]


@dataclass(frozen=True)
class Origin:
    """The source of a written file: weights read one by one, and the logits they give."""

    config: LlamaConfig
    names: Sequence[str]
    weight: Callable[[str], Tensor]
    logits: Callable[[Tensor], Array]


def origin_of(model: Llama) -> Origin:
    """Return a model in memory as the origin."""
    weights = {name: weight.detach().cpu() for name, weight in model.named_parameters()}
    return Origin(model.config, list(weights), weights.__getitem__, lambda ids: _float32_logits(model, ids))


def origin_in(readback: Readback, config: LlamaConfig, names: Sequence[str]) -> Origin:
    """Open a file with an independent reader and return it as the origin."""

    def weight(name: str) -> Tensor:
        order = _row_order(name, config) if readback.shape.is_interleaved else None
        rows = readback.weight(name)[:]
        return torch.from_numpy(np.array(rows if order is None else rows[order], dtype=np.float32))

    return Origin(config, names, weight, lambda ids: logits(readback.weight, readback.shape, ids.numpy()))


def verify(
    readback: Readback,
    origin: Origin,
    tokenizer: Tokenizer | None,
    bound: Bound,
) -> Report:
    """Compare a file with the model and tokenizer it was written from; `bound` gives each weight's allowed error.

    Raises:
        GateFailed: a weight is missing, foreign, misshapen or out of bounds, or the logits differ for no reason.
    """
    errors = compare_tensors(readback, origin, bound)
    probe = probe_ids(origin.config, tokenizer)
    source = origin.logits(probe)
    found = logits(readback.weight, readback.shape, probe.numpy())
    if not np.isfinite(found).all():
        raise GateFailed("the file's logits are not finite; nothing was written")
    difference = max(float(np.abs(ours - theirs).max()) for ours, theirs in zip(found, source, strict=True))
    if max(errors.values()) == 0 and difference > _SAME_LOGITS * max(1.0, float(np.abs(source).max())):
        raise GateFailed(
            f"every weight of the file is right, yet its logits differ by {difference:.3g}: what it says of the "
            "architecture is wrong; nothing was written"
        )
    _check_control_tokens(readback, tokenizer)
    divergence = _kl(source, found)
    strings = [] if tokenizer is None else [*HARD_STRINGS, *_pieces(tokenizer)]
    differing = [text for text in strings if tokenizer is not None and readback.encode(text) != tokenizer.encode(text)]
    return Report(
        max_logit_difference=difference,
        kl=float(divergence.mean()),
        max_kl=float(divergence.max()),
        top1=float((source.argmax(-1) == found.argmax(-1)).mean()),
        tensor_errors=errors,
        num_strings=len(strings),
        differing_strings=differing,
    )


def _check_control_tokens(readback: Readback, tokenizer: Tokenizer | None) -> None:
    """Check that tokens which no text becomes have the ids they had, and that the same ones begin and end a text.

    Raises:
        GateFailed.
    """
    if tokenizer is None or readback.id_of is None:
        return
    found = {repr(token["content"]): readback.id_of(token["content"]) for token in tokenizer.content["added_tokens"]}
    wanted = {repr(token["content"]): token["id"] for token in tokenizer.content["added_tokens"]}
    wanted |= {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    for name, index in (found | dict(readback.roles)).items():
        if index != wanted[name]:
            raise GateFailed(
                f"the token {name} is {index} in the file, {wanted[name]} in the tokenizer; nothing was written"
            )


def compare_tensors(readback: Readback, origin: Origin, bound: Bound) -> dict[str, float]:
    """Return the largest |difference| of each weight.

    Raises:
        GateFailed: a weight is missing, foreign, misshapen or out of bounds.
    """
    if readback.names != set(origin.names):
        differing = sorted(readback.names ^ set(origin.names))
        raise GateFailed(f"the file has other tensors than the model, {differing[0]} first; nothing was written")
    errors: dict[str, float] = {}
    for name in origin.names:
        weight, found = origin.weight(name), readback.weight(name)
        if found.shape != tuple(weight.shape):
            raise GateFailed(
                f"{name} is {found.shape} in the file, {tuple(weight.shape)} in the model; nothing written"
            )
        order = _row_order(name, origin.config) if readback.shape.is_interleaved else None
        allowed = bound(name, weight)
        errors[name] = 0.0
        step = max(1, _COMPARED_AT_ONCE // math.prod(weight.shape[1:]))
        for rows in (slice(start, start + step) for start in range(0, weight.shape[0], step)):
            values = torch.from_numpy(np.array(found[rows if order is None else order[rows]], dtype=np.float32))
            error = (values - weight[rows].float()).abs()
            errors[name] = max(errors[name], float(error.max()))
            if not bool((error <= allowed(rows)).all()):
                raise GateFailed(
                    f"{name} differs by {errors[name]:.3g} in the file, more than its rounding; nothing was written"
                )
    return errors


def _row_order(name: str, config: LlamaConfig) -> Array | None:
    """Map half-split rows to an interleaved file: row i of the first half is at 2i, of the second at 2i + 1."""
    heads = {"q_proj": config.num_heads, "k_proj": config.kv_heads}.get(name.split(".")[-2])
    if heads is None:
        return None
    width = config.head_width
    inside = [2 * i for i in range(width // 2)] + [2 * i + 1 for i in range(width // 2)]
    return np.array([head * width + row for head in range(heads) for row in inside])


def probe_ids(config: LlamaConfig, tokenizer: Tokenizer | None) -> Tensor:
    """Return the tokens to compare logits on: hard text where there is a tokenizer, and random ids."""
    length = min(_PROBE_LENGTH, config.max_seq_len)
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    ids = torch.randint(0, config.vocab_size, (_PROBE_ROWS, length), generator=generator)
    if tokenizer is not None:
        text = [token for string in HARD_STRINGS for token in tokenizer.encode(string) if token < config.vocab_size]
        for row, start in zip(range(_PROBE_ROWS // 2), range(0, len(text), length), strict=False):
            part = text[start : start + length]
            ids[row, : len(part)] = torch.tensor(part)
    return ids


def _float32_logits(model: Llama, input_ids: Tensor) -> Array:
    """Compute the source's logits in float32, one block in float32 at a time whatever the model is stored in."""
    blocks = [model.model.embed_tokens, *model.model.layers, model.model.norm]
    hooks = [hook for block in blocks for hook in _in_float32(block)]
    try:
        with torch.inference_mode():
            hidden = model.hidden(input_ids.to(model.device))
            return (hidden @ cast(Tensor, model.head_weight).float().T).double().cpu().numpy()
    finally:
        for hook in hooks:
            hook.remove()


def _in_float32(block: nn.Module) -> list[Any]:
    """Widen a block's weights for each of its forwards; the very tensors it had are put back."""
    stored: dict[nn.Parameter, Tensor] = {}

    def widen(*_: Any) -> None:
        for parameter in block.parameters():
            stored[parameter], parameter.data = parameter.data, parameter.data.float()

    def put_back(*_: Any) -> None:
        for parameter, data in stored.items():
            parameter.data = data
        stored.clear()

    return [block.register_forward_pre_hook(widen), block.register_forward_hook(put_back)]


def _kl(source: Array, found: Array) -> Array:
    """Return the divergence of each probe token, a row at a time: a vocabulary is wide."""
    divergence = np.empty(source.shape[:-1])
    for row, pair in enumerate(zip(source, found, strict=True)):
        p, q = (values - values.max(-1, keepdims=True) for values in pair)
        p, q = (values - np.log(np.exp(values).sum(-1, keepdims=True)) for values in (p, q))
        divergence[row] = (np.exp(p) * (p - q)).sum(-1).clip(min=0)
    return divergence


def _pieces(tokenizer: Tokenizer) -> list[str]:
    """Return the text of some tokens all over the vocabulary: each must encode alike."""
    step = max(1, tokenizer.vocab_size // _NUM_PIECES)
    texts = (tokenizer.token_bytes[index].decode("utf-8", "ignore") for index in range(0, tokenizer.vocab_size, step))
    return [text for text in texts if text and tokenizer.id_of(text) not in tokenizer.special_ids]
