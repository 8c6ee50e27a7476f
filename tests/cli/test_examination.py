"""`entrenar doctor RUN` says what happened, what is good and what to do next, whatever state the folder is in."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from entrenar import recipe
from entrenar.cli.main import main
from entrenar.config_file import load_config
from entrenar.errors import TrainingHalted

from ..small import small_corpus, small_run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A small corpus."""
    return small_corpus(tmp_path_factory.mktemp("data"))


def _train(corpus: Path, runs: Path, **changes: str) -> Path:
    options = {"train__max_steps": "4", "train__eval_every": "2", "checkpoint__keep_last": "9"} | changes
    recipe.train(load_config(None, small_run(corpus, runs, **options)))
    return runs / "first"


def _said(capsys, *words: object) -> str:
    code = main(["doctor", *map(str, words)])
    assert code == 0, capsys.readouterr()
    return capsys.readouterr().out


def test_a_complete_run_is_good_and_can_be_used(corpus, tmp_path, capsys):
    """Its checkpoints are whole, the newest is what a resume takes, and it is ready to generate; as JSON too."""
    run = _train(corpus, tmp_path)
    out = _said(capsys, run)
    assert out.startswith(f"{run}: pre-training begun ")
    assert "4 steps; complete" in out
    assert "step-00000002   whole" in out
    assert "a resume takes this one" in next(line for line in out.splitlines() if "step-00000004" in line)
    assert f"entrenar generate {run} --prompt" in out
    found = json.loads(_said(capsys, "first", "--runs-dir", tmp_path, "--json"))
    assert [one["fault"] for one in found["checkpoints"]] == [None, None]
    code = (
        f"import sys\nfrom entrenar.cli.main import main\nmain(['doctor', {str(run)!r}])\nprint('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.endswith(
        "False\n"
    )


def test_damage_is_named_and_the_older_checkpoint_is_offered(corpus, tmp_path, capsys):
    """A flipped byte, an unfinished save and a copy are told apart; with nothing whole the exit code is 2."""
    run = _train(corpus, tmp_path)
    weights = run / "checkpoints" / "step-00000004" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (run / "checkpoints" / ".incomplete-step-00000006-0123abcd").mkdir()
    out = _said(capsys, run)
    assert "step-00000004   DAMAGED: model/model.safetensors does not match its sha256" in out
    assert "a resume takes this one" in next(line for line in out.splitlines() if "step-00000002" in line)
    assert ".incomplete-step-00000006-0123abcd: begun and never finished" in out
    (run / "checkpoints" / "step-00000002" / "manifest.json").unlink()
    assert main(["doctor", str(run)]) == 2
    out = capsys.readouterr().out
    assert "no readable manifest" in out
    assert "restore a copy" in out
    assert f"entrenar train --overwrite --name first --runs-dir {tmp_path}" in out


def test_a_run_that_an_alarm_stopped_can_be_looked_into(corpus, tmp_path, capsys):
    """The alarm is told once, and the bundle and the resume are what comes next."""
    with pytest.raises(TrainingHalted):
        _train(
            corpus, tmp_path, monitor__halt_on='["dead_gradient"]', monitor__dead_gradient_norm="1e9",
            monitor__dead_gradient_steps="3",
        )  # fmt: skip
    run = tmp_path / "first"
    out = _said(capsys, run)
    assert out.count("dead_gradient") == 1
    assert "stopped by an alarm at step 2" in out
    assert f"entrenar replay {run / 'replay' / 'step-00000003.json'}" in out
    assert f"entrenar train --resume --name first --runs-dir {tmp_path}" in out


def test_a_live_run_is_not_disturbed(corpus, tmp_path, capsys):
    """A process that holds the lock is named, and watching is all that is offered."""
    run = _train(corpus, tmp_path)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        out = _said(capsys, run)
    assert f"runs now, process {os.getpid()}" in out
    assert f"entrenar watch {run}" in out
    assert "--resume" not in out


@pytest.mark.parametrize("content", ["", "{", '{"step": 1}\n', "\x00\xff"])
def test_a_folder_in_any_state_is_described(tmp_path, capsys, content):
    """Damaged records, no checkpoint: no traceback, and a way to start."""
    run = tmp_path / "odd"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.jsonl").write_text(content, encoding="latin-1")
    (run / "events.jsonl").write_text(content, encoding="latin-1")
    out = _said(capsys, run)
    assert "no checkpoint yet" in out
    assert "entrenar train --name odd" in out


def test_what_does_not_belong_to_a_run_is_refused(tmp_path, capsys):
    """No such run, and flags of the other modes."""
    assert main(["doctor", "none", "--runs-dir", str(tmp_path)]) == 2
    assert "the runs there are: none" in capsys.readouterr().err
    assert main(["doctor", "none", "--numerics"]) == 2
    assert "only --runs-dir and --json" in capsys.readouterr().err
