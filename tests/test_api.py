"""`api`: the library's eight names work like the commands, with Python's values and errors that speak of arguments."""

import shutil
import subprocess
import sys
import types

import pytest
import torch

import entrenar
from entrenar.config_file import load_config, load_finetune_config
from entrenar.data import PrepareConfig, prepare
from entrenar.errors import CheckpointError, ConfigError
from entrenar.recipe import Observer

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
    few = {key: options[key] for key in ("model", "data", "max_steps", "threads")}
    tuning = entrenar.plan(method="lora", rank=2, **few)
    assert 0 < tuning.step.trained_parameters < tuning.parameters
    (tmp_path / "tune.toml").write_text(f'model = "{trained.run_dir}"\n[sft]\ndata = ["{rows}"]\n[lora]\nrank = 2\n')
    assert entrenar.plan(tmp_path / "tune.toml", threads=1).step.trained_parameters == tuning.step.trained_parameters
    finished = load_finetune_config(tmp_path / "tune.toml", {"train.threads": "1"})
    assert entrenar.plan(finished).parameters == tuning.parameters
    preset = load_config(None, {"preset": "tiny", "train.max_steps": "1", "train.threads": "1"})
    assert entrenar.plan(preset).parameters == preset.model.parameter_count()
    sized = entrenar.plan(corpus=corpus, batch_size=2, seq_len=32, max_steps=3, threads=1)
    assert sized.parameters < 1_000_000, "a small corpus asks for a small model, as on the command line"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: entrenar.pretrain(learning_rat=1, num_epochs=2, load_in_4bit=True),
            r"^learning_rat is not an option\nnum_epochs is not an option; did you mean epochs\?\n"
            r"load_in_4bit is not an option$",
        ),
        (lambda: entrenar.finetune(qlora=True), r"qlora is not an option; did you mean method='qlora'\?"),
        (
            lambda: entrenar.pretrain(lr="1e-3", max_steps="5", tensorboard="true", beta1=2.0),
            r"train.max_steps: must be a whole number, got the text '5' \(argument max_steps\)\n"
            r"train.tensorboard: must be True or False, got the text 'true' \(argument tensorboard\)\n"
            r"optim.lr: must be a number, got the text '1e-3' \(argument lr\)\n"
            r"optim.beta1: must be .*got 2.0 \(argument beta1\)$",
        ),
        (lambda: entrenar.pretrain(max_steps=True), r"train.max_steps: must be .* \(argument max_steps\)"),
        (lambda: entrenar.finetune(data="rows.jsonl"), r"model is required; pass model=…, or set it in a config file"),
        (lambda: entrenar.finetune(rank_pattern="a", model="m", data="d"), "lora.rank_pattern: must be a table"),
        (
            lambda: entrenar.generate(None, None, "a", seed="1"),
            r"seed: must be a whole number, got the text '1' \(argument",
        ),
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
    config = load_config(None, {"train.max_steps": "1", "preset": "tiny"})
    with pytest.raises(ConfigError, match="options cannot be given next to a RunConfig"):
        entrenar.pretrain(config, lr=1.0)
    tuning = load_finetune_config(None, {"model": "a", "sft.data": "b"})
    with pytest.raises(ConfigError, match="options cannot be given next to a FinetuneConfig"):
        entrenar.finetune(tuning, lr=1.0)
    with pytest.raises(ConfigError, match="finetune needs a FinetuneConfig, got a RunConfig"):
        entrenar.finetune(config)
    with pytest.raises(ConfigError, match="pretrain needs a RunConfig, got a FinetuneConfig"):
        entrenar.pretrain(tuning)


def test_advice_from_further_in_speaks_of_arguments(trained, corpus, tmp_path):
    """The flags of the command line become what this caller can pass, and the error keeps its kind."""
    same = {"name": "a", "runs_dir": corpus.parent / "runs", "corpus": corpus, "threads": 1, "seq_len": 32}
    with pytest.raises(
        ConfigError, match=r"continue it with resume=True, replace it with overwrite=True, or choose anot"
    ):
        entrenar.pretrain(**same, max_steps=3, **SIZES)
    with pytest.raises(ConfigError, match=r"^resume=True and overwrite=True exclude each other"):
        entrenar.pretrain(**same, **SIZES, resume=True, overwrite=True)
    with pytest.raises(CheckpointError, match=r"allow the change \(allow_config_changes=True\)"):
        entrenar.pretrain(**same, **SIZES, resume=True, lr=2e-3)
    with pytest.raises(ConfigError, match=r"^dtype for gguf must be one of .*, got 'x'"):
        entrenar.convert(trained.run_dir, tmp_path / "m.gguf", "gguf", dtype="x")
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ConfigError, match="name another place or give overwrite=True"):
        entrenar.convert(trained.run_dir, tmp_path / "m.gguf", "gguf")


def test_a_run_is_resumed_by_its_name(trained, corpus, tmp_path):
    """Its own config is read; a single path and text are lists of one."""
    shutil.copytree(trained.run_dir, tmp_path / "a")
    report = entrenar.pretrain(resume=True, name="a", runs_dir=tmp_path, max_steps=4)
    assert report.outcome.step == 4
    with pytest.raises(ConfigError, match=r"config file .*finetune.config\.toml does not exist"):
        entrenar.finetune(resume=True, runs_dir=tmp_path)


def test_in_a_notebook_the_progress_is_shown(trained, tmp_path, monkeypatch):
    """One output, replaced until the run has ended; an observer of the caller's own takes its place."""
    outputs = []

    class Handle:
        def update(self, shown) -> None:
            outputs.append(shown._repr_html_())

    kernel = types.SimpleNamespace(get_ipython=lambda: types.SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    display = types.SimpleNamespace(display=lambda _, **_options: Handle())
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    shutil.copytree(trained.run_dir, tmp_path / "a")
    same = {"resume": True, "name": "a", "runs_dir": tmp_path}
    entrenar.pretrain(**same, max_steps=5)
    assert "Checking the corpus" in outputs[0]
    assert "step 5  loss" in outputs[-1]
    assert "<progress" not in outputs[-1]
    shown, records = len(outputs), []
    entrenar.pretrain(**same, max_steps=6, observer=Observer(on_record=records.append))
    assert (len(outputs), [record.step for record in records]) == (shown, [6])


def test_names_are_loaded_when_used():
    """Importing brings no torch, listing names neither; an unknown name is an AttributeError."""
    code = "import sys, entrenar as e; dir(e); print('torch' in sys.modules); e.pretrain; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = entrenar.trian
