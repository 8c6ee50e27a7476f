"""A tiny model with a tokenizer, and a text to calibrate on."""

import pytest
import torch

from entrenar.data import Tokenizer, train_bpe
from entrenar.model import Llama, LlamaConfig

TEXT = "the cat sat on the mat and the dog lay by the door while it rained all day long " * 60


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe([TEXT], 280)


@pytest.fixture
def model() -> Llama:
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=76, max_seq_len=64
    )
    model = Llama(config).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path
