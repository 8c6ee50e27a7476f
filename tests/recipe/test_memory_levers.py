"""The levers on memory are settings of a run: all of them together leave the same adapter, bit for bit."""

import json
from pathlib import Path

import pytest
import torch

from entrenar import recipe
from entrenar.config_file import load_finetune_config
from entrenar.data import train_bpe
from entrenar.errors import ConfigError
from entrenar.files import sha256_file
from entrenar.interop import save_model
from entrenar.model import Llama, LlamaConfig
from entrenar.train import latest_good, offload

ROWS = [{"prompt": f"count to {number}:", "completion": f" {number} {number}"} for number in range(40)]
LEVERS = {"checkpointing": "full", "offload": "disk", "stream_base": "true", "freed_memory": "return"}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bfloat16 model folder with its tokenizer, and rows."""
    place = tmp_path_factory.mktemp("levers")
    tokenizer = train_bpe([json.dumps(row) for row in ROWS] * 2, 300)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        intermediate_size=128,
        max_seq_len=64,
    )
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    (place / "model").mkdir()
    save_model(place / "model", config, {name: weight.bfloat16() for name, weight in model.state_dict().items()})
    tokenizer.save(place / "model")
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return place / "model", place / "rows.jsonl"


def _adapter(places: tuple[Path, Path], name: str, runs: Path, **train: str) -> str:
    """Fine-tune for four steps and return the adapter's hash."""
    model, rows = places
    given = {
        "model": str(model), "sft.data": str(rows), "sft.batch_size": "2", "name": name, "runs_dir": str(runs),
        "train.max_steps": "4", "train.precision": "bfloat16", "train.threads": "1", "train.eval_every": "0",
        "lora.lora_dropout": "0.1", "compute_dtype": "float32", "task.sample_answers": "0",
    }  # fmt: skip
    config = load_finetune_config(None, given | {f"train.{key}": value for key, value in train.items()})
    recipe.finetune(config)
    (weights,) = latest_good(config.run_dir / "checkpoints").path.glob("*/adapter_model.safetensors")
    return sha256_file(weights)


def test_all_levers_together_change_nothing(
    places: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout and packed rows: recomputed, on disk, streamed and returned, the adapter is the same."""
    plain = _adapter(places, "plain", tmp_path)
    taken: list[int] = []
    monkeypatch.setattr(offload, "LEAST_BYTES", 1)
    close = offload.ActivationStore.close
    monkeypatch.setattr(
        offload.ActivationStore, "close", lambda store: (taken.append(store.most_bytes), close(store))[1]
    )
    assert _adapter(places, "levers", tmp_path, **LEVERS) == plain
    assert taken[0] > 0
    assert _adapter(places, "other", tmp_path, seed="1") != plain


def test_a_base_that_is_not_mapped_cannot_be_streamed(places: tuple[Path, Path], tmp_path: Path) -> None:
    """A bfloat16 folder in float32 is a copy, and the message says what to do."""
    with pytest.raises(ConfigError, match="stream_base needs frozen layers that are mapped from a file"):
        _adapter(places, "widened", tmp_path, precision="float32", stream_base="true")
