"""`api`: the library's eight names work like the commands, with Python's values and errors that speak of arguments."""

import subprocess
import sys

import pytest
import torch

import entrenar
from entrenar.data import PrepareConfig, prepare
from entrenar.errors import ConfigError

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "intermediate_size": 64,
    "max_seq_len": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small corpus."""
    folder = tmp_path_factory.mktemp("api")
    (folder / "text.txt").write_text(
        "\n\n".join(f"Line {number} says hello to line {number + 1}." for number in range(900))
    )
    prepare([folder / "text.txt"], folder / "corpus", PrepareConfig(vocab_size=300, val_fraction=0.2))
    return folder / "corpus"


@pytest.fixture(scope="module")
def trained(corpus):
    """A run of three steps."""
    return entrenar.pretrain(
        name="a", runs_dir=corpus.parent / "runs", corpus=[corpus], batch_size=2, seq_len=32, max_steps=3, lr=1e-3,
        threads=1, **SIZES,
    )  # fmt: skip


def test_a_run_is_trained_loaded_measured_and_generates(trained, corpus):
    """Numbers are numbers, paths are paths, and each function takes what the one before gave."""
    assert trained.outcome.step == 3
    model, tokenizer = entrenar.load(trained.run_dir, dtype=torch.float32)
    assert isinstance(model.config, entrenar.LlamaConfig)
    one = entrenar.generate(model, tokenizer, "Line 7", max_new_tokens=5, temperature=0.0)
    assert one == entrenar.generate(model, tokenizer, ["Line 7"], max_new_tokens=5, temperature=0.0)
    assert entrenar.evaluate(trained.run_dir, corpus, seq_len=32).loss == pytest.approx(trained.after.loss, rel=1e-5)


def test_a_model_is_fine_tuned_planned_and_converted(trained, corpus, tmp_path):
    """The other three names."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "Line {n}", "completion": " says hello"}}\n' for n in range(40)))
    options = {"model": trained.run_dir, "data": [rows], "max_steps": 2, "threads": 1, "sft.seq_len": 32,
               "eval_fraction": 0.2, "prompt_format": "plain"}  # fmt: skip
    tuned = entrenar.finetune(runs_dir=tmp_path / "runs", method="lora", rank=2, **options)
    assert (tuned.folder / "adapter_model.safetensors").is_file()
    report = entrenar.convert(trained.run_dir, tmp_path / "model.gguf", "gguf", dtype="f32")
    assert report["kl"] < 1e-6
    planned = entrenar.plan(name="a", corpus=[corpus], batch_size=2, seq_len=32, max_steps=3, threads=1, **SIZES)
    assert planned.step.peak_bytes > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: entrenar.pretrain(learning_rat=1), "learning_rat is not an option"),
        (lambda: entrenar.pretrain(lr=-1.0, max_steps=1), r"optim\.lr"),
        (
            lambda: entrenar.generate(None, None, "a", temprature=1),
            "temprature is not an option; did you mean temperature",
        ),
        (lambda: entrenar.generate(None, None, "a", temperature=-1), "temperature"),
    ],
)
def test_a_wrong_argument_is_named(call, message):
    """Our own error, in the words of the caller."""
    with pytest.raises(ConfigError, match=message):
        call()


def test_a_config_and_options_exclude_each_other():
    """An option next to a finished config would be ignored, so it is refused."""
    from entrenar.config_file import load_config  # noqa: PLC0415

    config = load_config(None, {"train.max_steps": "1", "preset": "tiny"})
    with pytest.raises(ConfigError, match="options cannot be given next to a RunConfig"):
        entrenar.pretrain(config, lr=1.0)


def test_names_are_loaded_when_used():
    """Importing brings no torch, listing names neither; an unknown name is an AttributeError."""
    code = "import sys, entrenar as e; dir(e); print('torch' in sys.modules); e.pretrain; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = entrenar.trian
