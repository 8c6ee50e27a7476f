"""A step whose alarm stopped the run is taken again, bit for bit, and whatever differs is told apart."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from entrenar import recipe
from entrenar.cli.main import main
from entrenar.config import FinetuneConfig
from entrenar.config_file import load_config, load_finetune_config
from entrenar.errors import ConfigError, FormatError, TrainingHalted
from entrenar.files import sha256_file
from entrenar.recipe.replay import replay
from entrenar.runs import read_records
from entrenar.train.replay import Bundle

from ..small import small_corpus, small_run

STEP_4_HALTS = {"monitor.halt_on": '["dead_gradient"]', "monitor.dead_gradient_norm": "1e9"}


def _pretrain(folder: Path, **flags: str) -> Path:
    """Train a small model until an alarm stops it, if one does; return the run's folder."""
    config = load_config(None, small_run(small_corpus(folder), folder / "runs", train__grad_accum_steps="2") | flags)
    with suppress(TrainingHalted):
        recipe.train(config)
    return config.run_dir


@pytest.fixture(scope="module")
def halted(tmp_path_factory) -> Path:
    """A pre-training run that an alarm stopped at step 4."""
    return _pretrain(tmp_path_factory.mktemp("halted"), **STEP_4_HALTS, **{"monitor.dead_gradient_steps": "4"})


def _content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_file(path) for path in folder.rglob("*") if path.is_file()}


def test_the_step_is_taken_again_bit_for_bit(halted, capsys):
    """Every figure has the same bits, the run's folder is as it was, and the command says so and ends with 0."""
    bundle = halted / "replay" / "step-00000004.json"
    before = _content(halted)
    found = replay(bundle)
    assert (found.are_batches_same, found.differing, found.machine_changes) == (True, (), ())
    assert found.bundle.checkpoint == "checkpoints/step-00000003"
    assert len(found.figures) == 2 + 2 + 2  # loss and norm, two layers, embedding and last norm: the head is tied
    (event,) = [event for event in read_records(halted / "events.jsonl") if event["kind"] == "bundle_written"]
    assert event["message"] == f"`entrenar replay {bundle}` takes the step again"
    assert main(["replay", str(bundle)]) == 0
    out = capsys.readouterr().out
    assert "Every bit is the same" in out
    assert "dead_gradient" in out
    assert _content(halted) == before


def test_before_the_first_checkpoint_the_run_begins_anew(tmp_path):
    """An alarm at the first step leaves no checkpoint: the replay starts from the seed."""
    run = _pretrain(tmp_path, **STEP_4_HALTS, **{"monitor.dead_gradient_steps": "1"})
    found = replay(run / "replay" / "step-00000001.json")
    assert found.bundle.checkpoint is None
    assert (found.are_batches_same, found.differing) == (True, ())


def _tampered(bundle: Path, **changes: object) -> Path:
    path = bundle.with_name("tampered.json")
    path.write_text(json.dumps(json.loads(bundle.read_text()) | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "suspect memory or processor"),
        ({"machine": {"ranks": 1, "threads": 64}}, "threads changed since"),
        ({"batches": ["0" * 64] * 2}, "the data of the step have changed"),
    ],
)
def test_what_differs_is_told_apart(halted, capsys, changes, said):
    """Another loss is exit code 1, with the suspicion that the other facts leave."""
    bundle = halted / "replay" / "step-00000004.json"
    figures = json.loads(bundle.read_text())["figures"]
    changed = float.fromhex(figures["loss"])
    tampered = _tampered(bundle, figures={**figures, "loss": float(np.nextafter(changed, 9)).hex()}, **changes)
    assert main(["replay", str(tampered)]) == 1
    captured = capsys.readouterr()
    assert "OTHER BITS" in captured.out
    assert said in captured.err


def test_a_finetuning_step_is_taken_again(tmp_path):
    """An adapter's step too, over a base that a run left."""
    base = _pretrain(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"def {i}", "completion": " return 0"}) + "\n" for i in range(40)))
    config: FinetuneConfig = load_finetune_config(
        None,
        {
            "model": str(base), "sft.data": json.dumps([str(rows)]), "name": "tuned",
            "runs_dir": str(tmp_path / "runs"), "train.max_steps": "6", "train.threads": "1", "sft.batch_size": "2",
            "checkpoint.save_every": "2", "monitor.dead_gradient_steps": "4", **STEP_4_HALTS,
        },
    )  # fmt: skip
    with pytest.raises(TrainingHalted):
        recipe.finetune(config)
    found = replay(config.run_dir / "replay" / "step-00000004.json")
    assert (found.are_batches_same, found.differing) == (True, ())


def test_a_bundle_keeps_every_bit(tmp_path):
    """NaN, infinity and the last bit of a number survive the file."""
    figures = {"loss": float("nan"), "gradient norm": float("inf"), "gradient norm of a": 0.1}
    bundle = Bundle(3, "spike", None, None, {"i": 1}, ("ab",), figures, {}, {"threads": 1}, None)
    bundle.write(tmp_path / "replay" / "one.json")
    read = Bundle.read(tmp_path / "replay" / "one.json")
    assert {name: value.hex() for name, value in read.figures.items()} == {n: v.hex() for n, v in figures.items()}
    assert (read.step, read.after, read.batches) == (3, {"i": 1}, ("ab",))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a bundle"),
        ('{"format": "entrenar-replay", "version": 2}', "version 1"),
        ('{"format": "entrenar-replay", "version": 1}', "damaged"),
        ('{"format": "entrenar-replay", "version": 1, "figures": {"loss": 1}}', "damaged"),
    ],
)
def test_what_is_no_bundle_is_refused(tmp_path, content, said):
    """A damaged file, another file and another version are named."""
    path = tmp_path / "bundle.json"
    path.write_text(content)
    with pytest.raises(FormatError, match=said):
        Bundle.read(path)


def test_a_bundle_outside_of_its_run_is_refused(halted, tmp_path, capsys):
    """The checkpoint and the settings are found from the bundle's place."""
    lone = tmp_path / "replay" / "step-00000004.json"
    lone.parent.mkdir()
    lone.write_bytes((halted / "replay" / "step-00000004.json").read_bytes())
    with pytest.raises(ConfigError, match="must lie in RUN/replay"):
        replay(lone)
    assert main(["replay", str(tmp_path / "none.json")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_a_step_of_several_ranks_is_refused(halted):
    """One process has other shares of the batch: other bits would say nothing about the machine."""
    bundle = halted / "replay" / "step-00000004.json"
    with pytest.raises(ConfigError, match="a step of 2 ranks"):
        replay(_tampered(bundle, machine={"ranks": 2}))
