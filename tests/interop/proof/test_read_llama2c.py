"""The offsets that the proof counts are those of the writer, in every version."""

import numpy as np
import pytest
import torch

from entrenar.interop.llama2c import save_llama2c
from entrenar.interop.proof.numpy_llama import logits
from entrenar.interop.proof.read_llama2c import read_llama2c
from entrenar.model import Llama, LlamaConfig


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("version", [0, 1])
def test_the_logits_are_the_model_s(tmp_path, version, is_tied):
    """A file, or the folder around it: all weights are found, in the file's own order of rows."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, max_seq_len=32,
        tie_word_embeddings=is_tied,
    )  # fmt: skip
    model = Llama(config).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    save_llama2c(tmp_path / "model.bin", config, model.state_dict(), version=version)
    ids = torch.randint(0, 97, (1, 12), generator=torch.Generator().manual_seed(1))
    for path in (tmp_path, tmp_path / "model.bin"):
        read = read_llama2c(path)
        assert read.names == {name for name, _ in model.named_parameters()}
        with torch.no_grad():
            assert np.abs(logits(read.weight, read.shape, ids.numpy()) - model(ids).numpy()).max() < 1e-4
