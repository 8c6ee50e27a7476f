"""A merge says by how much it moved the logits, and is undone when that is too much."""

import pytest
import torch

from entrenar.errors import ConfigError, GateFailed
from entrenar.model import Llama, LlamaConfig
from entrenar.peft import LoraConfig, checked_merge, from_base, merge, plain_state

CONFIG = LlamaConfig(vocab_size=61, hidden_size=24, num_layers=2, num_heads=4, intermediate_size=40, max_seq_len=32)
IDS = torch.arange(20).reshape(2, 10) * 3


def adapted(dtype: torch.dtype) -> Llama:
    model = Llama(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(dtype)
    from_base(model, LoraConfig(rank=3, lora_dropout=0.5), torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    return model


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.float64, 0, 1e-12), (torch.bfloat16, 1e-5, 1e-1)])
def test_report_is_what_the_logits_say(dtype: torch.dtype, low: float, high: float) -> None:
    """The figures are those of the three models on the probe; rounding to bfloat16 shows, float64 does not."""
    model = adapted(dtype).train()
    unmerged = model.eval()(IDS).detach()
    model.train()
    report = checked_merge(model, "default", IDS)
    assert model.training
    merged = model.eval()(IDS).detach()
    base = Llama(CONFIG)
    base.init_weights(torch.Generator().manual_seed(0))
    effect = (unmerged - base.to(dtype)(IDS)).detach().float().abs().max()
    assert report.largest_difference == float((merged.float() - unmerged.float()).abs().max())
    assert low <= report.largest_difference <= high
    assert report.adapter_effect == pytest.approx(float(effect), rel=1e-6)
    assert report.adapter_effect > 10 * report.largest_difference
    assert report.same_choice == float((merged.argmax(-1) == unmerged.argmax(-1)).double().mean())
    assert report.tokens == 20


def test_too_large_a_difference_is_refused_and_undone() -> None:
    """Above the limit the weights are the base's again, bit for bit, and the figure is in the message."""
    model = adapted(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in plain_state(model).items()}
    with pytest.raises(
        GateFailed,
        match=r"^merging moved a logit by [0-9.e-]+, more than the 1e-09 allowed \(the adapter itself moves one by "
        r"[0-9.e-]+\); keep it apart, or merge in float32$",
    ):
        checked_merge(model, "default", IDS, refuse_above=1e-9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain_state(model).items())
    checked_merge(model, "default", IDS, refuse_above=1.0)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in plain_state(model).items())


def test_a_merge_that_gives_nan_is_refused() -> None:
    """NaN is above every limit."""
    model = adapted(torch.float32)
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "v_proj" in name)[0, 0] = float("nan")
    with pytest.raises(GateFailed, match="moved a logit by nan"):
        checked_merge(model, "default", IDS, refuse_above=1e9)


def test_merged_model_cannot_be_measured_again() -> None:
    """The unmerged logits are gone while a merge is in the weights."""
    model = adapted(torch.float32)
    merge(model)
    with pytest.raises(ConfigError, match="unmerge it first"):
        checked_merge(model, "default", IDS)
