"""Layers of a mapped base come and go: the same gradients with a fraction of the base in memory."""

from pathlib import Path

import pytest
import torch

from entrenar.errors import ConfigError
from entrenar.interop import load_model, save_model
from entrenar.model import Llama, LlamaConfig
from entrenar.peft import LoraConfig, from_base

LAYERS = 8
CONFIG = LlamaConfig(
    vocab_size=64, hidden_size=256, num_layers=LAYERS, num_heads=4, intermediate_size=1024, max_seq_len=32
)
LAYER_BYTES = 4 * (4 * 256 * 256 + 3 * 256 * 1024)
IDS = torch.arange(32)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of eight layers of 4 MiB each."""
    model = Llama(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    place = tmp_path_factory.mktemp("mapped")
    save_model(place, CONFIG, model.state_dict())
    return place


def _adapted(folder: Path) -> Llama:
    model = load_model(folder)
    from_base(model, LoraConfig(rank=4, lora_alpha=8, target_modules=("q_proj", "up_proj")), torch.Generator())
    return model.train()


def _mapped_bytes(folder: Path) -> int:
    """Return how much of the folder's mapped files is resident."""
    total, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            is_ours = str(folder) in line
        elif is_ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def _step(model: Llama, folder: Path) -> tuple[list[torch.Tensor], int]:
    """Return the gradients and the most of the base that was resident when a block began, forward or backward."""
    seen = [0]

    def look(*_: object) -> None:
        seen.append(_mapped_bytes(folder))

    for block in model.model.layers:
        block.register_forward_hook(look)
        block.self_attn.o_proj.register_full_backward_hook(look)
    model.zero_grad()
    model.loss(IDS, IDS).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None], max(seen)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_a_step_holds_few_layers_and_has_the_same_gradients(folder: Path, checkpointing: str) -> None:
    """Streamed, never more than three layers are resident, and every gradient is bit for bit the one without."""
    plain = _adapted(folder)
    plain.checkpointing = checkpointing
    expected, most = _step(plain, folder)
    assert most > (LAYERS - 1) * LAYER_BYTES
    del plain
    gradients, most = _step(_streamed(folder, checkpointing), folder)
    assert most < 3.5 * LAYER_BYTES
    assert len(gradients) == len(expected) == 4 * LAYERS
    for mine, other in zip(gradients, expected, strict=True):
        assert torch.equal(mine, other)


def _streamed(folder: Path, checkpointing: str) -> Llama:
    model = _adapted(folder)
    model.checkpointing = checkpointing
    model.stream_base()
    assert model.stream is not None
    assert model.stream.size_bytes >= LAYERS * LAYER_BYTES
    return model


def test_loading_leaves_nothing_resident(folder: Path) -> None:
    """A checked and mapped model takes no memory until it is used."""
    model = load_model(folder)
    assert _mapped_bytes(folder) < LAYER_BYTES
    assert torch.isfinite(model.lm_head.weight).all()


def test_what_is_trained_or_not_of_a_file_is_never_given_back(folder: Path) -> None:
    """Weights that are trained keep what was written to them; weights in memory alone are no base to stream."""
    trained = load_model(folder)
    with pytest.raises(ConfigError, match="stream_base needs frozen layers that are mapped from a file as they are"):
        trained.stream_base()
    copied = load_model(folder, dtype=torch.bfloat16).requires_grad_(requires_grad=False)
    with pytest.raises(ConfigError, match="or leave stream_base out"):
        copied.stream_base()
    mixed = _adapted(folder)
    weight = mixed.model.layers[0].mlp.down_proj.weight.requires_grad_()
    with torch.no_grad():
        weight.fill_(3.0)
    mixed.stream_base()
    mixed.loss(IDS, IDS).backward()
    assert (weight == 3.0).all()
