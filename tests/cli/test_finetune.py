"""`entrenar finetune`: flags, the table of what is trained, the report, and resuming by name."""

import json

import pytest
import torch

from entrenar import recipe
from entrenar.cli.main import main
from entrenar.config import FinetuneConfig, options
from entrenar.data import train_bpe
from entrenar.model import Llama, LlamaConfig


@pytest.fixture
def words(tmp_path):
    """The flags of a run of two steps over a small model."""
    tokenizer = train_bpe(["the cat sat on the mat and ran"] * 4, 300)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24,
        max_seq_len=32, eos_token_id=tokenizer.eos_id,
    )  # fmt: skip
    model = Llama(config)
    model.init_weights(torch.Generator().manual_seed(0))
    recipe.write_model_folder(tmp_path / "base", model, dict(model.named_parameters()), tokenizer)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"cat {n}", "completion": " sat"}) + "\n" for n in range(40)))
    given = {"model": tmp_path / "base", "data": data, "runs-dir": tmp_path / "runs", "max-steps": 2, "threads": 1}
    given["compute-dtype"] = "float32"
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def test_the_command_line_fine_tunes_and_resumes(words, tmp_path, capsys):
    """It prints the trainable table at the start and where the adapter is at the end; --resume needs the name only."""
    assert main(["finetune", *words, "--name", "t", "--target-modules", "q_proj,up_proj", "--rank", "4"]) == 0
    said = capsys.readouterr().out
    assert "q_proj.lora_A" in said
    assert "up_proj.lora_B" in said
    assert "% fewer)" in said
    assert "held-out before" in said
    assert "held-out after" in said
    assert "  … " in said
    folder = tmp_path / "runs/t/checkpoints/step-00000002/model"
    assert f"adapter           {folder}" in said
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    resume = ["--resume", "--name", "t", "--runs-dir", str(tmp_path / "runs"), "--max-steps", "3"]
    assert main(["finetune", *resume]) == 0
    assert "Training complete!] 3 steps" in capsys.readouterr().out
    assert main(["generate", str(tmp_path / "runs/t"), "--prompt", "cat", "--max-new-tokens", "2"]) == 0


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_run_resumes_from_its_own_config(words, tmp_path, capsys, method):
    """Of every method: `--resume --name` alone reads the config that the run wrote, and a longer length trains on."""
    assert main(["finetune", *words, "--name", "t", "--method", method]) == 0
    resume = ["finetune", "--resume", "--name", "t", "--runs-dir", str(tmp_path / "runs")]
    capsys.readouterr()
    assert main(resume) == 0
    said = capsys.readouterr().out
    assert "Nothing to train] the run is at step 2 already: trained to the planned end; raise --max-steps" in said
    assert "Training complete" not in said
    assert main([*resume, "--max-steps", "3"]) == 0
    assert "Training complete!] 3 steps" in capsys.readouterr().out


def test_faults_are_answered_with_2(words, capsys):
    """A misspelt flag, a missing file of rows and a missing model are told by name."""
    assert main(["finetune", *words, "--rnk", "4"]) == 2
    assert "--rnk is not a flag of entrenar finetune; did you mean --rank?" in capsys.readouterr().err
    assert main(["finetune", "--data", "x.jsonl"]) == 2
    said = capsys.readouterr().err
    assert "ConfigError: model is required; give --model, or set it in a config file" in said
    assert "sft is required" not in said
    assert main(["finetune"]) == 2
    assert "sft.data is required; give --data, or set it in a config file" in capsys.readouterr().err
    assert main(["finetune", *words[:2], "--data", "missing.jsonl"]) == 2
    assert "missing.jsonl does not exist" in capsys.readouterr().err


def test_a_shortened_flag_is_refused(capsys):
    """A flag is written out: what begins like several today may begin like another tomorrow."""
    assert main(["finetune", "--model", "x", "--data", "y", "--ran", "4"]) == 2
    assert "--ran is not a flag of entrenar finetune; did you mean --rank?" in capsys.readouterr().err


def test_each_option_has_a_flag_of_its_own():
    """No two options of a fine-tuning config share a flag."""
    flags = [option.flag for option in options(FinetuneConfig)]
    assert len(flags) == len(set(flags))
    assert {"--model", "--data", "--method", "--layers", "--cache-trunk"} <= set(flags)
