"""The proof's own frequencies are the model's, though no line is shared."""

import numpy as np
import pytest

from entrenar.interop.proof.frequencies import frequencies
from entrenar.model import LlamaConfig, RopeScaling
from entrenar.model.rope_scaling import inverse_frequencies

SCALINGS = {
    "none": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 512},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn's options": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 16.0,
                       "beta_slow": 2.0, "attention_factor": 0.7, "truncate": False},
    "yarn's mscale": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "mscale": 0.7,
                      "mscale_all_dim": 1.2},
}  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
def test_they_are_the_model_s(name):
    """Each rule, to the rounding of float32; the factor of cos and sin too."""
    scaling = SCALINGS[name]
    config = LlamaConfig(
        hidden_size=256, num_heads=4, max_seq_len=2048, rope_theta=20000.0,
        rope_scaling=RopeScaling(**scaling) if scaling else None,
    )  # fmt: skip
    ours, factor = inverse_frequencies(config, 0)
    found, scale = frequencies(20000.0, 64, scaling)
    np.testing.assert_allclose(found, ours.numpy(), rtol=2e-6)
    assert scale == pytest.approx(factor)


def test_the_oldest_spelling_counts():
    """`type` for `rope_type`."""
    found, _ = frequencies(10000.0, 8, {"type": "linear", "factor": 2.0})
    np.testing.assert_allclose(found * 2, frequencies(10000.0, 8, {})[0])
