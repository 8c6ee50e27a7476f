"""A tiny model with random weights, and what the tests of several formats do with it."""

import pytest
import torch

from entrenar.model import Llama, LlamaConfig

TINY = {
    "vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2,
    "intermediate_size": 64, "max_seq_len": 64,
}  # fmt: skip


@pytest.fixture
def make_model(generator):
    """Make a tiny model; keywords change its config."""

    def make(**changes) -> Llama:
        model = Llama(LlamaConfig(**{**TINY, **changes}))
        model.init_weights(generator)
        return model.eval()

    return make


@pytest.fixture
def input_ids() -> torch.Tensor:
    """Some tokens of the tiny model."""
    return torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))
