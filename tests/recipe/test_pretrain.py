"""The whole road, from text to a model that is resumed, measured and read by others."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from entrenar import recipe
from entrenar.cli.main import main
from entrenar.config import RunConfig
from entrenar.config_file import load_config
from entrenar.data import Corpus, PrepareConfig, prepare
from entrenar.errors import CheckpointError, ConfigError, DataError, MachineError, OutOfMemoryError, TrainingHalted
from entrenar.files import sha256_file
from entrenar.infer import evaluate
from entrenar.planning import MemoryLimit, machine
from entrenar.recipe import pretrain
from entrenar.runs import RunFolder
from entrenar.train import latest_good

VOCAB_SIZE = 300


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A small corpus with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("data")
    words = np.random.default_rng(0).choice(
        ["def", "return", "value", "self", "import", "for", "in", "0"], size=(400, 30)
    )
    text = "\n----\n".join(" ".join(row) for row in words)
    (folder / "text.txt").write_text(text, encoding="utf-8")
    config = PrepareConfig(vocab_size=VOCAB_SIZE, val_fraction=0.1, document_separator="----", threads=1)
    prepare([folder / "text.txt"], folder / "corpus", config)
    return folder / "corpus"


def config_for(corpus: Path, runs: Path, **flags: str) -> RunConfig:
    """A run of a model of two small layers."""
    base = {
        "name": "trial", "runs_dir": str(runs), "data.corpus": json.dumps([str(corpus)]), "data.batch_size": "4",
        "data.seq_len": "32", "model.vocab_size": str(VOCAB_SIZE), "model.hidden_size": "32", "model.num_layers": "2",
        "model.num_heads": "4", "model.num_kv_heads": "2", "model.intermediate_size": "64", "model.max_seq_len": "64",
        "train.max_steps": "6", "optim.lr": "0.01", "train.eval_every": "0", "train.threads": "1",
        "train.grad_accum_steps": "2", "checkpoint.save_every": "2",
    }  # fmt: skip
    return load_config(None, base | {key.replace("__", "."): value for key, value in flags.items()})


def tensors_of(run_dir: Path) -> dict[str, str]:
    """The hash of every tensor file of the newest checkpoint."""
    folder = latest_good(run_dir / "checkpoints").path
    return {str(path.relative_to(folder)): sha256_file(path) for path in folder.rglob("*.safetensors")}


def test_training_lowers_the_held_out_loss(corpus, tmp_path):
    """Sixty steps leave a lower held-out loss than none, and the report says both."""
    report = recipe.train(config_for(corpus, tmp_path, train__max_steps="60", checkpoint__save_every="0"))
    assert report.before is not None
    assert report.before.loss == pytest.approx(np.log(VOCAB_SIZE), rel=0.05)
    assert report.after.loss < 0.6 * report.before.loss
    assert report.after.bits_per_byte is not None


def test_a_corpus_with_nothing_held_out_trains_without_a_held_out_loss(tmp_path):
    """The advice of prepare and the rules of train agree; only early stopping needs held-out text."""
    (tmp_path / "text.txt").write_text("def return value self import\n" * 400)
    options = PrepareConfig(vocab_size=VOCAB_SIZE, val_fraction=0, threads=1)
    prepare([tmp_path / "text.txt"], tmp_path / "corpus", options)
    said = []
    observer = recipe.Observer(on_stage=said.append)
    report = recipe.train(config_for(tmp_path / "corpus", tmp_path / "runs"), observer=observer)
    assert (report.before, report.after, report.outcome.step) == (None, None, 6)
    assert any("No held-out text (prepared with val_fraction 0)" in line for line in said)
    impatient = config_for(tmp_path / "corpus", tmp_path / "other", train__early_stop_patience="2")
    with pytest.raises(DataError, match=r"^train\.early_stop_patience needs held-out text, but the corpora were prep"):
        recipe.train(impatient)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_equals_an_uninterrupted_one(corpus, tmp_path, precision):
    """Two steps, a stop, two steps, a second stop and two more are six steps, byte for byte."""
    # Constant: other schedules are stretched over the run's steps, which differ between the parts.
    flags = {"train__precision": precision, "compute_dtype": "float32", "schedule__schedule": "constant"}
    recipe.train(config_for(corpus, tmp_path / "whole", **flags))
    for steps in ("2", "4", "6"):
        config = config_for(corpus, tmp_path / "parts", train__max_steps=steps, **flags)
        recipe.train(config, resume=steps != "2")
    whole, parts = (latest_good(tmp_path / name / "trial" / "checkpoints") for name in ("whole", "parts"))
    assert whole.loader_state == parts.loader_state
    assert whole.state["rng"] == parts.state["rng"]
    assert tensors_of(tmp_path / "whole" / "trial") == tensors_of(tmp_path / "parts" / "trial")


def test_a_killed_run_goes_on_byte_for_byte(corpus, tmp_path):
    """A run killed by SIGKILL in the middle and resumed ends with the bytes of a run that was not."""
    words = ["--runs-dir", str(tmp_path / "killed"), *flags_of(config_for(corpus, tmp_path))]
    command = [sys.executable, "-m", "entrenar", "train", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    checkpoints = tmp_path / "killed" / "trial" / "checkpoints"
    deadline = time.monotonic() + 60
    while not list(checkpoints.glob("step-*/manifest.json")):
        assert time.monotonic() < deadline, "no checkpoint appeared"
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    recipe.train(config_for(corpus, tmp_path / "killed", train__max_steps="40"), resume=True)
    recipe.train(config_for(corpus, tmp_path / "whole", train__max_steps="40"))
    assert tensors_of(tmp_path / "killed" / "trial") == tensors_of(tmp_path / "whole" / "trial")


def flags_of(config: RunConfig) -> list[str]:
    """The flags that make this config, for forty steps."""
    model = config.model.model_dump(exclude_unset=True)
    flags = {**model, **config.train.model_dump(exclude_unset=True), **config.data.model_dump(exclude_unset=True)}
    flags |= {**config.optim.model_dump(exclude_unset=True), **config.checkpoint.model_dump(exclude_unset=True)}
    flags |= {"corpus": json.dumps([str(path) for path in config.data.corpus]), "name": "trial", "max_steps": 40}
    return [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), str(value))]


def test_a_changed_config_is_refused_with_the_difference(corpus, tmp_path):
    """Resuming with another learning rate names it; --allow-config-changes goes on."""
    recipe.train(config_for(corpus, tmp_path, train__max_steps="2"))
    changed = config_for(corpus, tmp_path, optim__lr="0.02", train__max_steps="3")
    with pytest.raises(CheckpointError, match=r"optim\.lr"):
        recipe.train(changed, resume=True)
    assert recipe.train(changed, resume=True, allow_changes=True).outcome.step == 3


def test_a_run_that_was_moved_goes_on(corpus, tmp_path):
    """A run's name and place are no part of what it computes."""
    recipe.train(config_for(corpus, tmp_path, train__max_steps="2"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "trial").rename(tmp_path / "elsewhere" / "renamed")
    moved = config_for(corpus, tmp_path / "elsewhere", name="renamed", train__max_steps="3")
    assert recipe.train(moved, resume=True).outcome.step == 3


def test_a_damaged_checkpoint_falls_back_to_the_one_before(corpus, tmp_path):
    """One flipped bit in the newest checkpoint: the run goes on from the one before and says so."""
    recipe.train(config_for(corpus, tmp_path, train__max_steps="4"))
    weights = tmp_path / "trial" / "checkpoints" / "step-00000004" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    events = []
    observer = recipe.Observer(on_event=events.append)
    report = recipe.train(config_for(corpus, tmp_path, train__max_steps="6"), resume=True, observer=observer)
    assert report.outcome.step == 6
    assert any(event.kind == "checkpoint_damaged" and "step-00000004" in event.message for event in events)


def test_a_checkpoint_opens_in_transformers(corpus, tmp_path):
    """The model folder of a checkpoint loads with AutoModelForCausalLM and gives the same logits."""
    transformers = pytest.importorskip("transformers")
    recipe.train(config_for(corpus, tmp_path, train__max_steps="2"))
    model, _ = recipe.open_model(tmp_path / "trial")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(recipe.model_folder(tmp_path / "trial"))
    ids = torch.randint(0, VOCAB_SIZE, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_run_is_not_overwritten_unasked(corpus, tmp_path):
    """A second run of the same name is refused with the ways out."""
    recipe.train(config_for(corpus, tmp_path, train__max_steps="1"))
    with pytest.raises(
        ConfigError, match=r"already holds a run; continue it with --resume, replace it with --overwrite"
    ):
        recipe.train(config_for(corpus, tmp_path, train__max_steps="1"))
    report = recipe.train(config_for(corpus, tmp_path, train__max_steps="1"), overwrite=True)
    assert report.outcome.step == 1


@pytest.mark.parametrize("fault", ["corpus", "tokenizer", "batch"])
def test_a_fault_in_the_new_run_leaves_the_one_it_was_to_replace(corpus, tmp_path, fault):
    """--overwrite deletes nothing until the new run is known to fit together."""
    recipe.train(config_for(corpus, tmp_path, train__max_steps="1"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "trial").rglob("*")}
    flags = {
        "corpus": {"data__corpus": json.dumps([str(tmp_path / "nowhere")])},
        "tokenizer": {"model__vocab_size": "200"},
        "batch": {"data__batch_size": "100000"},
    }[fault]
    with pytest.raises(DataError):
        recipe.train(config_for(corpus, tmp_path, **flags), overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "trial").rglob("*")} == before


def test_resuming_and_overwriting_at_once_is_refused(corpus, tmp_path):
    """The two are told apart before anything is deleted."""
    recipe.train(config_for(corpus, tmp_path, train__max_steps="1"))
    with pytest.raises(ConfigError, match="--resume and --overwrite exclude each other; leave one out"):
        recipe.train(config_for(corpus, tmp_path), resume=True, overwrite=True)
    assert latest_good(tmp_path / "trial" / "checkpoints").step == 1


@pytest.mark.parametrize("mode", [{}, {"resume": True}, {"overwrite": True}])
def test_two_runs_in_one_folder_are_refused(corpus, tmp_path, mode):
    """The second one names the process of the first, exits with 3, and leaves its folder as it is."""
    config = config_for(corpus, tmp_path, train__max_steps="1")
    recipe.train(config)
    run = RunFolder(config.run_dir)
    hold = (
        "import sys; from pathlib import Path; from entrenar import locks\nwith locks.held(Path(sys.argv[1]), 'x'):\n"
    )
    command = [sys.executable, "-c", f"{hold} print('held', flush=True); sys.stdin.read()", str(run.lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        before = sorted(run.path.rglob("*"))
        with pytest.raises(MachineError, match=rf"trial is in use by process {other.pid}: wait for its end") as raised:
            recipe.train(config, **mode)
        assert raised.value.exit_code == 3
        assert sorted(run.path.rglob("*")) == before
    recipe.train(config, overwrite=True)


def test_a_run_that_began_meanwhile_is_not_replaced(corpus, tmp_path, monkeypatch):
    """Two fresh runs of one name: the second one got as far as its folder when the first had just ended there."""
    config = config_for(corpus, tmp_path, train__max_steps="1")
    build = pretrain._build_model

    def slow(*arguments):
        monkeypatch.undo()
        recipe.train(config)
        return build(*arguments)

    monkeypatch.setattr(pretrain, "_build_model", slow)
    with pytest.raises(ConfigError, match="already holds a run"):
        recipe.train(config)
    assert latest_good(config.run_dir / "checkpoints").step == 1


def test_a_run_folder_that_cannot_be_made_is_the_machines_fault(corpus, tmp_path):
    """A runs_dir below a file names the place."""
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match=r"cannot write .*file/runs/trial: Not a directory"):
        recipe.train(config_for(corpus, tmp_path / "file" / "runs"))


def test_corpora_of_different_tokenizers_are_refused_before_anything_is_computed(corpus, tmp_path):
    """The second corpus' ids may not even be rows of the embedding."""
    text = tmp_path / "text.txt"
    text.write_text("\n----\n".join(f"{number} {'xyz ' * number}" for number in range(60)), encoding="utf-8")
    other = PrepareConfig(vocab_size=VOCAB_SIZE + 50, val_fraction=0.2, document_separator="----", threads=1)
    prepare([text], tmp_path / "other", other)
    stages = []
    config = config_for(corpus, tmp_path, data__corpus=json.dumps([str(corpus), str(tmp_path / "other")]))
    with pytest.raises(DataError, match="were made with different tokenizers"):
        recipe.train(config, observer=recipe.Observer(on_stage=stages.append))
    assert stages == ["Checking the corpus"]


def test_a_run_that_a_signal_ends_does_not_stay_to_measure(corpus, tmp_path, monkeypatch):
    """After SIGTERM the held-out text is not read again: who sends it may send SIGKILL next."""
    measured = []
    monkeypatch.setattr(pretrain, "evaluate", lambda *given: measured.append(1) or evaluate(*given))

    def stop(record):
        if record.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    observer = recipe.Observer(on_record=stop)
    report = recipe.train(config_for(corpus, tmp_path, checkpoint__save_every="0"), observer=observer)
    assert (report.outcome.reason, report.outcome.step, report.after) == ("signal", 4, None)
    assert len(measured) == 1  # before the first step


def test_the_last_step_is_measured_once(corpus, tmp_path, monkeypatch):
    """The report's figures are those of the last record, not a second reading of the held-out text."""
    measured = []
    monkeypatch.setattr(pretrain, "evaluate", lambda *given: measured.append(1) or evaluate(*given))
    report = recipe.train(config_for(corpus, tmp_path, checkpoint__save_every="0"))
    assert len(measured) == 2
    assert report.after.loss == report.outcome.last_record.held_out["loss"]
    again = recipe.train(config_for(corpus, tmp_path), resume=True)  # no step is left
    assert again.after.loss == report.after.loss


def test_the_measured_compute_dtype_is_kept_for_the_life_of_a_run(corpus, tmp_path, monkeypatch):
    """A machine that has become faster at another type does not change the arithmetic of a run."""
    flags = {"train__precision": "bfloat16", "compute_dtype": "auto", "optim__optimizer": "muon"}
    monkeypatch.setattr(machine, "fastest_compute_dtype", lambda *_: torch.float32)
    recipe.train(config_for(corpus, tmp_path, train__max_steps="1", **flags))
    monkeypatch.setattr(machine, "fastest_compute_dtype", lambda *_: torch.bfloat16)
    recipe.train(config_for(corpus, tmp_path, train__max_steps="2", **flags), resume=True)
    recorded = latest_good(tmp_path / "trial" / "checkpoints").state["config"]
    assert recorded["compute_dtype"] == recorded["optim"]["muon_dtype"] == "float32"


def test_a_dry_run_checks_what_a_run_would_and_changes_nothing(corpus, tmp_path, capsys):
    """It ends as the run would have begun: with 0, or with the fault; sources are named, not read."""
    words = [*flags_of(config_for(corpus, tmp_path)), "--runs-dir", str(tmp_path / "runs"), "--dry-run"]
    assert main(["train", *words]) == 0
    assert f"{corpus}: whole; tokens: train " in capsys.readouterr().out
    assert main(["train", *words, "--corpus", str(tmp_path / "nowhere")]) == 2
    assert "is not a corpus" in capsys.readouterr().err
    assert main(["train", *words, "--batch-size", "100000"]) == 2
    assert "the batch is larger than the corpus" in capsys.readouterr().err
    assert main(["train", *words, "--corpus", str(tmp_path / "nowhere"), "--sources", "stdlib"]) == 0
    assert "nowhere: to be prepared from stdlib" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "nowhere").exists()


def test_resuming_what_is_not_there_is_refused(corpus, tmp_path):
    """--resume without a run says to start without it."""
    with pytest.raises(CheckpointError, match=r"no run to resume at .*; start it without --resume"):
        recipe.train(config_for(corpus, tmp_path), resume=True)


def test_a_tokenizer_larger_than_the_model_is_refused(corpus, tmp_path):
    """A vocabulary that does not fit names both sizes."""
    with pytest.raises(DataError, match=r"tokenizer has \d+ tokens, model\.vocab_size is 200; set model\.vocab_size"):
        recipe.train(config_for(corpus, tmp_path, model__vocab_size="200"))


def test_a_device_that_is_not_there_is_refused(corpus, tmp_path):
    """A GPU on a machine without one is a config error."""
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="device must be one that this machine has, got cuda"):
        recipe.train(config_for(corpus, tmp_path, device="cuda"))


def test_no_model_is_told_apart_from_a_model(tmp_path):
    """A folder without a model says what would be one."""
    with pytest.raises(DataError, match="neither a model folder"):
        recipe.model_folder(tmp_path)


def test_a_missing_corpus_is_made_from_its_sources(tmp_path):
    """A run whose corpus does not exist prepares it from data.sources first."""
    rows = (json.dumps({"text": f"document {number} of {number * number} words"}) for number in range(800))
    rows_file = tmp_path / "rows.jsonl"
    rows_file.write_text("\n".join(rows), encoding="utf-8")
    new = tmp_path / "corpus"
    recipe.train(config_for(new, tmp_path, data__sources=json.dumps([str(rows_file)]), train__max_steps="1"))
    assert Corpus.open(new).manifest.splits["val"].documents > 0


def test_the_command_line_trains_evaluates_and_writes(corpus, tmp_path, capsys):
    """train, eval and generate work on the same run, and say what the spec's lines say."""
    words = flags_of(config_for(corpus, tmp_path))
    assert main(["train", *words, "--runs-dir", str(tmp_path), "--epochs", "2", "--max-steps", "60"]) == 0
    said = capsys.readouterr().out
    assert "[entrenar: Epoch 1/2, Loss: " in said
    assert "[entrenar: Backward pass: " in said
    assert "[entrenar: Training complete!]" in said
    assert main(["eval", str(tmp_path / "trial"), "--corpus", str(corpus), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["loss"] < np.log(VOCAB_SIZE)
    with pytest.raises(ConfigError, match="seq_len must be <= 64, the model's context, got 65"):
        recipe.evaluate_model(tmp_path / "trial", corpus, batch_size=1, seq_len=65)
    written = [
        "generate",
        str(tmp_path / "trial"),
        "--prompt",
        "def value",
        "--max-new-tokens",
        "5",
        "--temperature",
        "0",
    ]
    assert main(written) == 0
    assert capsys.readouterr().out.startswith("def value")


def test_a_run_that_names_no_model_gets_a_small_one(corpus, tmp_path):
    """Vocabulary and width follow from the corpus, are recorded, and a resume without them takes the recorded ones."""
    flags = {"data.corpus": json.dumps([str(corpus)]), "runs_dir": str(tmp_path), "train.max_steps": "1",
             "data.seq_len": "32", "data.batch_size": "2", "train.eval_every": "0"}  # fmt: skip
    report = recipe.train(load_config(None, flags))
    model = load_config(tmp_path / "run" / "config.toml").model
    assert (model.vocab_size, model.hidden_size) == (Corpus.open(corpus).tokenizer().vocab_size, 64)
    assert report.outcome.step == 1
    again = recipe.train(load_config(None, flags | {"train.max_steps": "2"}), resume=True)
    assert again.outcome.step == 2


def test_a_model_beyond_the_memory_is_refused_before_it_is_built(corpus, tmp_path, monkeypatch):
    """The run's folder is not made, and no weight is allocated."""
    monkeypatch.setattr("entrenar.planning.sizing.memory_limit", lambda: MemoryLimit(10**5, "this test"))
    with pytest.raises(OutOfMemoryError, match=r"takes at least .* GB .* but this test is 0\.0 GB"):
        recipe.train(config_for(corpus, tmp_path))
    assert not (tmp_path / "trial").exists()


def test_more_time_counts_from_the_checkpoint(corpus, tmp_path):
    """A run that time ended continues for as long again; without more time there is nothing left to do."""
    flags = {"train__max_time_s": "1.5", "train__eval_every": "0", "checkpoint__save_every": "0"}
    config = config_for(corpus, tmp_path, **flags)
    config = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": None})})
    first = recipe.train(config)
    assert first.outcome.reason == "time"
    done = recipe.train(config, resume=True)
    assert (done.outcome.step, done.outcome.last_record) == (first.outcome.step, None)
    longer = recipe.train(config, resume=True, adds_time=True)
    assert longer.outcome.step > first.outcome.step
    elapsed = longer.outcome.last_record.elapsed_s - first.outcome.last_record.elapsed_s
    assert elapsed >= 1.5
    recorded = load_config(tmp_path / "trial" / "config.toml").train.max_time_s
    assert recorded > first.outcome.last_record.elapsed_s + 1.5  # a later --resume would end there too


@pytest.mark.parametrize(("flag", "value"), [("--batch-size", "0"), ("--seq-len", "-5"), ("--threads", "-1")])
def test_numbers_of_the_command_line_are_checked_before_anything_is_loaded(flag, value, capsys):
    """A count below one ends with 2 and the rule."""
    assert main(["eval", "nowhere", "--corpus", "nowhere", flag, value]) == 2
    assert f"argument {flag}: must be a whole number >= 1, got '{value}'" in capsys.readouterr().err


def test_the_command_line_answers_a_fault_with_exit_code_2(tmp_path, capsys):
    """A misspelt flag and a missing model end with 2 and one message."""
    assert main(["train", "--batchsize", "4"]) == 2
    assert "--batchsize is not a flag of entrenar train; did you mean --batch-size?" in capsys.readouterr().err
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert main(["nonsense"]) == 2


def test_a_missing_tensorboard_is_found_before_the_run_folder_is_made(corpus, tmp_path, monkeypatch):
    """The package is looked for first, so that the same command works after the install."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    config = config_for(corpus, tmp_path, train__tensorboard="true")
    with pytest.raises(ConfigError, match=r"tensorboard = true needs the tensorboard package; pip install"):
        recipe.train(config)
    assert not config.run_dir.exists()


def test_a_missing_tracker_is_found_before_the_run_folder_is_made(corpus, tmp_path, monkeypatch):
    """As TensorBoard is."""
    monkeypatch.setitem(sys.modules, "mlflow", None)
    config = config_for(corpus, tmp_path, train__trackers="mlflow")
    with pytest.raises(ConfigError, match=r"trackers = mlflow needs the mlflow package; pip install"):
        recipe.train(config)
    assert not config.run_dir.exists()


def test_a_tracker_gets_the_records_of_a_run(corpus, tmp_path, monkeypatch):
    """The losses that the run's own file has, and the settings."""
    told = []

    def begin(**values):
        told.append(values)
        return SimpleNamespace(
            log=lambda figures, step: told.append((step, figures)), finish=lambda: told.append("end")
        )

    stand_in = ModuleType("trackio")
    stand_in.__spec__, stand_in.init = ModuleSpec("trackio", None), begin
    monkeypatch.setitem(sys.modules, "trackio", stand_in)
    config = config_for(corpus, tmp_path, train__trackers="trackio", train__max_steps="2")
    recipe.train(config)
    assert told[0]["config"]["train"]["max_steps"] == 2
    losses = [(step, figures["train/loss"]) for step, figures in told[1:-1] if "train/loss" in figures]
    assert losses == [(record.step, record.loss) for record in RunFolder(config.run_dir).read_steps()]
    assert told[-1] == "end"


def test_a_tracker_learns_that_an_alarm_ended_the_run(corpus, tmp_path, monkeypatch):
    """The run diverges; Weights & Biases gets an exit code that is not 0."""
    codes = []

    def finish(*, exit_code: int) -> None:
        codes.append(exit_code)

    run = SimpleNamespace(log=lambda _: None, define_metric=lambda *_, **_values: None, finish=finish)
    stand_in = ModuleType("wandb")
    stand_in.__spec__, stand_in.init, stand_in.Settings = ModuleSpec("wandb", None), lambda **_: run, dict
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    with pytest.raises(TrainingHalted):
        recipe.train(config_for(corpus, tmp_path, train__trackers="wandb", optim__lr="1e38", train__max_steps="9"))
    assert codes == [1]
