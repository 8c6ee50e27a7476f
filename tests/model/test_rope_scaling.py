"""Rotary frequencies equal the published vectors; the table is right for every length, device and document."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from entrenar.model import Llama, LlamaConfig, RopeScaling
from entrenar.model.rope_scaling import RotaryTable, inverse_frequencies
from entrenar.ops import Documents

HEADS = {"hidden_size": 128, "num_heads": 1, "intermediate_size": 8, "num_layers": 1}
DYNAMIC = LlamaConfig(**HEADS, max_seq_len=8, rope_scaling=RopeScaling(rope_type="dynamic", factor=10.0))


def frequencies(scaling: dict[str, Any] | None, length: int = 2048) -> torch.Tensor:
    rope_scaling = None if scaling is None else RopeScaling(**scaling)
    return inverse_frequencies(LlamaConfig(**HEADS, rope_scaling=rope_scaling), length)[0]


@pytest.mark.parametrize("rule", ["default", "llama3", "dynamic", "yarn"])
def test_frequencies_equal_the_published_vectors(rule: str, shared_data: Path) -> None:
    """For a head of 128 and a context of 2048, each rule gives the published numbers, which have five digits."""
    oracle = json.loads((shared_data / "oracles/rope_inv_freq.json").read_text())[rule]
    ours = frequencies(oracle.get("rope_scaling"), oracle.get("seq_len", 2048))
    torch.testing.assert_close(ours, torch.tensor(oracle["inv_freq"]), rtol=1e-4, atol=0)


def test_linear_divides_every_frequency() -> None:
    """Linear scaling is division by the factor."""
    torch.testing.assert_close(
        frequencies({"rope_type": "linear", "factor": 4.0}) * 4, frequencies(None), rtol=0, atol=0
    )


def test_yarn_attention_factor() -> None:
    """Cos and sin grow by 0.1 ln(factor) + 1, by the ratio of two such terms, or by what the config says."""

    def factor(**options: Any) -> float:
        scaling = RopeScaling(rope_type="yarn", factor=10.0, **options)
        return inverse_frequencies(LlamaConfig(**HEADS, rope_scaling=scaling), 1)[1]

    assert factor() == pytest.approx(0.1 * math.log(10) + 1, abs=1e-12)
    expected = (0.1 * 2.0 * math.log(10) + 1) / (0.1 * 0.5 * math.log(10) + 1)
    assert factor(mscale=2.0, mscale_all_dim=0.5) == pytest.approx(expected, abs=1e-12)
    assert factor(attention_factor=1.5) == 1.5
    table, _ = RotaryTable(
        LlamaConfig(**HEADS, rope_scaling=RopeScaling(rope_type="yarn", factor=10.0, attention_factor=1.5))
    ).rows(1, torch.device("cpu"))
    assert table[0].eq(1.5).all()


def test_yarn_keeps_fast_planes_and_divides_slow_ones() -> None:
    """The fastest plane keeps its frequency, the slowest is divided by the factor."""
    scaled, plain = frequencies({"rope_type": "yarn", "factor": 8.0}), frequencies(None)
    assert scaled[0] == plain[0]
    torch.testing.assert_close(scaled[-1] * 8, plain[-1], rtol=1e-6, atol=0)


def test_dynamic_scaling_acts_beyond_the_context_only() -> None:
    """Up to max_seq_len nothing changes; beyond, longer texts turn more slowly."""
    default, _ = inverse_frequencies(LlamaConfig(**HEADS), 8)
    torch.testing.assert_close(inverse_frequencies(DYNAMIC, 8)[0], default, rtol=0, atol=0)
    longer, longest = inverse_frequencies(DYNAMIC, 9)[0], inverse_frequencies(DYNAMIC, 30)[0]
    assert (longest[1:] < longer[1:]).all()
    assert (longer[1:] < default[1:]).all()


def test_table_is_right_whatever_was_asked_before() -> None:
    """A long text leaves nothing behind that a short one would see."""
    table, cpu = RotaryTable(DYNAMIC), torch.device("cpu")
    for length in (5, 20, 9, 40, 3):
        cos, sin = table.rows(length, cpu)
        angles = torch.arange(length)[:, None].float() * inverse_frequencies(DYNAMIC, length)[0]
        torch.testing.assert_close(cos[:length], angles.cos(), rtol=0, atol=0)
        torch.testing.assert_close(sin[:length], angles.sin(), rtol=0, atol=0)


def test_documents_turn_as_if_alone_under_dynamic_scaling() -> None:
    """A short document beside a long one keeps the short one's frequencies."""
    table, cpu = RotaryTable(DYNAMIC), torch.device("cpu")
    documents = Documents.from_ids(torch.tensor([[0] * 6 + [1] * 14]))
    cos, sin = table.of_documents(documents)
    for start, end in documents.spans[0]:
        alone_cos, alone_sin = table.rows(end - start, cpu)
        # One unit in the last place: some processors' vector cosine rounds the rest of a block as a scalar does.
        torch.testing.assert_close(cos[0, start:end], alone_cos[: end - start], rtol=0, atol=2**-23)
        torch.testing.assert_close(sin[0, start:end], alone_sin[: end - start], rtol=0, atol=2**-23)


def test_table_made_while_inferring_serves_training() -> None:
    """A model that generated text first can be trained afterwards."""
    model = Llama(LlamaConfig.preset("tiny", num_layers=1))
    input_ids = torch.zeros(1, 4, dtype=torch.long)
    with torch.inference_mode():
        model(input_ids)
    model.loss(input_ids, input_ids).backward()
    assert model.model.embed_tokens.weight.grad is not None


def test_cast_leaves_the_table_in_float32() -> None:
    """`model.to(bfloat16)` casts the weights; angles in bfloat16 would place far tokens wrongly."""
    model = Llama(LlamaConfig.preset("tiny", num_layers=1)).to(torch.bfloat16)
    assert model(torch.zeros(1, 4, dtype=torch.long)).dtype == torch.bfloat16
    assert model.rotary.rows(4, torch.device("cpu"))[0].dtype == torch.float32
