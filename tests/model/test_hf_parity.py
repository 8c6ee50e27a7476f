"""Logits, loss and every gradient equal LlamaForCausalLM, and would not if a part of the model were missing."""

import pytest
import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from entrenar.model import Llama, LlamaConfig, RopeScaling
from entrenar.model.llama import Block

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_layers": 2, "intermediate_size": 56, "max_seq_len": 24}
YARN = RopeScaling(rope_type="yarn", factor=2.0, original_max_position_embeddings=12)
LLAMA3 = RopeScaling(
    rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=12
)
CONFIGS = {
    "mha": LlamaConfig(**SMALL, num_heads=4),
    "gqa": LlamaConfig(**SMALL, num_heads=4, num_kv_heads=2, tie_word_embeddings=True),
    "mqa": LlamaConfig(**SMALL, num_heads=4, num_kv_heads=1, rms_norm_eps=1e-2),
    "head_dim": LlamaConfig(**SMALL, num_heads=4, num_kv_heads=2, head_dim=20, rope_theta=500.0),
    "linear": LlamaConfig(**SMALL, num_heads=4, rope_scaling=RopeScaling(rope_type="linear", factor=3.0)),
    "dynamic": LlamaConfig(
        **(SMALL | {"max_seq_len": 8}), num_heads=4, rope_scaling=RopeScaling(rope_type="dynamic", factor=3.0)
    ),
    "yarn": LlamaConfig(**SMALL, num_heads=2, num_kv_heads=1, rope_scaling=YARN, tie_word_embeddings=True),
    "llama3": LlamaConfig(**SMALL, num_heads=2, rope_scaling=LLAMA3),
}


def exact_norm(module: LlamaRMSNorm, x: torch.Tensor) -> torch.Tensor:
    """LlamaRMSNorm without its cast to float32, which no float64 comparison survives."""
    return module.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon))


def transformers_model(config: LlamaConfig, dtype: torch.dtype) -> nn.Module:
    """LlamaForCausalLM with random weights, built from the config.json that we write."""
    their_config = transformers.LlamaConfig.from_dict(config.to_hf())
    theirs: nn.Module = transformers.AutoModelForCausalLM.from_config(their_config, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.3 if parameter.ndim == 1 else 0.0, 0.2)
    return theirs.to(dtype)


def pair(name: str, dtype: torch.dtype) -> tuple[Llama, nn.Module]:
    theirs = transformers_model(CONFIGS[name], dtype)
    ours = Llama(CONFIGS[name]).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def tokens(config: LlamaConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and already shifted targets, some of them untrained."""
    row = torch.randint(config.vocab_size, (3, 20), generator=torch.Generator().manual_seed(5))
    targets = row[:, 1:].clone()
    targets[0, :6] = -100
    return row[:, :-1], targets


def largest_difference(ours: Llama, theirs: nn.Module) -> float:
    """Of logits, loss and all gradients: the largest absolute difference."""
    input_ids, targets = tokens(ours.config)
    their_logits = theirs(input_ids).logits
    their_loss = nn.functional.cross_entropy(their_logits.flatten(0, 1), targets.flatten(), reduction="sum")
    their_loss.backward()
    loss = ours.loss(input_ids, targets)
    loss.backward()
    differences = [ours(input_ids) - their_logits, (loss - their_loss) / their_loss]
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        differences.append(parameter.grad - expected.pop(name).grad)
    assert not expected, f"parameters that only transformers has: {list(expected)}"
    return max(float(difference.detach().abs().max()) for difference in differences)


@pytest.mark.parametrize("name", CONFIGS)
def test_float64_logits_loss_and_gradients_equal_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 nothing differs by more than rounding, for every head layout and every rope scaling."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    assert largest_difference(*pair(name, torch.float64)) < 1e-9


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_logits_loss_and_gradients_equal_transformers(name: str) -> None:
    """In float32 all agree to 1e-5 of their size."""
    ours, theirs = pair(name, torch.float32)
    assert largest_difference(ours, theirs) < 1e-5


def without_attention_residual(self: Block, x: torch.Tensor, context: object, asked: None) -> torch.Tensor:
    x = self.self_attn(self.input_layernorm(x), context)
    return x + self.mlp(self.post_attention_layernorm(x))


def without_mlp_residual(self: Block, x: torch.Tensor, context: object, asked: None) -> torch.Tensor:
    x = x + self.self_attn(self.input_layernorm(x), context)
    return self.mlp(self.post_attention_layernorm(x))


def without_input_norm(self: Block, x: torch.Tensor, context: object, asked: None) -> torch.Tensor:
    x = x + self.self_attn(x * self.input_layernorm.weight, context)
    return x + self.mlp(self.post_attention_layernorm(x))


def without_mlp_norm(self: Block, x: torch.Tensor, context: object, asked: None) -> torch.Tensor:
    x = x + self.self_attn(self.input_layernorm(x), context)
    return x + self.mlp(x * self.post_attention_layernorm.weight)


@pytest.mark.parametrize(
    "ablated", [without_attention_residual, without_mlp_residual, without_input_norm, without_mlp_norm]
)
def test_parity_fails_without_a_residual_or_a_norm(ablated: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison sees a missing part: each ablation moves the result by far more than the tolerance."""
    monkeypatch.setattr(Block, "forward", ablated)
    assert largest_difference(*pair("gqa", torch.float32)) > 1e-2
