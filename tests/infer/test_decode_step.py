"""The flat decoding step equals the model, and is taken only where it holds."""

from typing import Any

import pytest
import torch
from torch import nn

from entrenar.errors import DataError
from entrenar.infer.decode_step import DecodeStep, is_plain, next_logits
from entrenar.model import KVCache, Llama, LlamaConfig, RopeScaling

SMALL = {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "intermediate_size": 40, "max_seq_len": 16}
CONFIGS = {
    "mha": LlamaConfig(**SMALL, num_heads=4, rms_norm_eps=1e-2),
    "gqa": LlamaConfig(**SMALL, num_heads=4, num_kv_heads=2, tie_word_embeddings=True),
    "mqa": LlamaConfig(**SMALL, num_heads=4, num_kv_heads=1, head_dim=10),
    "yarn": LlamaConfig(**SMALL, num_heads=2, rope_scaling=RopeScaling(rope_type="yarn", factor=2.0)),
}


def model_of(config: LlamaConfig, dtype: torch.dtype = torch.float64) -> Llama:
    model = Llama(config).to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.2 if weight.ndim == 1 else 0.0, 0.3, generator=torch.Generator().manual_seed(2))
    return model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("starts", [None, [3, 0, 1]], ids=["even", "padded"])
@torch.no_grad()
def test_step_equals_the_model(name: str, starts: list[int] | None) -> None:
    """Token by token, both give the same logits and leave the same cache, with and without left padding."""
    config = CONFIGS[name]
    model, rows = model_of(config), torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(3))
    flat, general = (KVCache(config, 3, 12, starts=starts, dtype=torch.float64) for _ in range(2))
    for cache in (flat, general):
        model(rows[:, :5], cache=cache)
    step = DecodeStep(model, flat)
    for token in rows[:, 5:].split(1, dim=1):
        torch.testing.assert_close(step(token), model(token, cache=general)[:, -1], rtol=0, atol=1e-11)
    assert flat.length == general.length == 12
    torch.testing.assert_close(flat.layers, general.layers, rtol=0, atol=1e-11)


def test_full_cache_is_refused() -> None:
    """The step keeps the cache's rule."""
    model = model_of(CONFIGS["mha"])
    step = DecodeStep(model, KVCache(model.config, 1, 1, dtype=torch.float64))
    step(torch.tensor([[1]]))
    with pytest.raises(DataError, match=r"takes max_len = 1 tokens, got 1 \+ 1"):
        step(torch.tensor([[1]]))


class Doubled(nn.Module):
    """Stands for an adapter around a projection."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        return 2 * self.inner(x)


@torch.no_grad()
def test_adapted_projection_is_not_passed_over() -> None:
    """A model whose projection was replaced answers through the replacement."""
    model, token = model_of(CONFIGS["gqa"]), torch.tensor([[7]])
    assert is_plain(model)
    plain = next_logits(model, KVCache(model.config, 1, 4, dtype=torch.float64))(token)
    block = model.model.layers[1]
    block.self_attn.v_proj = Doubled(block.self_attn.v_proj)
    assert not is_plain(model)
    adapted = next_logits(model, KVCache(model.config, 1, 4, dtype=torch.float64))(token)
    torch.testing.assert_close(adapted, model(token)[:, -1], rtol=0, atol=1e-11)
    assert (adapted - plain).abs().max() > 1e-3


@torch.no_grad()
def test_half_precision_goes_through_the_model() -> None:
    """bfloat16 weights, and products in another type than the weights', are left to the model."""
    model, token = model_of(CONFIGS["gqa"], torch.bfloat16), torch.tensor([[7]])
    assert not is_plain(model)
    logits = next_logits(model, KVCache(model.config, 1, 4, dtype=torch.bfloat16))(token)
    torch.testing.assert_close(logits, model(token)[:, -1], rtol=0, atol=0)
    wide = model_of(CONFIGS["gqa"])
    wide.set_compute_dtype(torch.float32)
    assert not is_plain(wide)
