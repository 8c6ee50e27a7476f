"""`entrenar quickstart`: what a newcomer sees."""

import re
import shlex

import pytest

from entrenar.cli.main import main
from entrenar.recipe import quickstart as module


def two_steps(config, corpus, whole=module.run_config):
    """Return the run of a quickstart, ended by steps and not by a clock."""
    run = whole(config, corpus)
    return run.model_copy(update={"train": run.train.model_copy(update={"max_steps": 2, "max_time_s": None})})


def test_a_newcomer_sees_samples_figures_and_commands_that_work(tmp_path, monkeypatch, capsys):
    """Text before and after, bits per byte next to gzip's and the grammar's, a warning if undertrained, next steps."""
    monkeypatch.setattr(module, "NUM_STORIES", 600)
    monkeypatch.setattr(module, "NUM_NEW_STORIES", 8)
    monkeypatch.setattr(module, "NUM_TOLD", 2)
    monkeypatch.setattr(module, "_TOKENS_PER_STORY", 24)
    monkeypatch.setattr(module, "run_config", two_steps)
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "before training",
        "after training",
        "bits per byte of new text",
        "gzip -9",
        "no model can need fewer",
    ):
        assert words in shown
    assert re.search(r"Undertrained: \d+ of about \d+ steps", shown)
    generate = next(line for line in shown.splitlines() if line.strip().startswith("entrenar generate"))
    assert main([*shlex.split(generate)[1:], "--max-new-tokens", "3"]) == 0
    resume = next(line for line in shown.splitlines() if line.strip().startswith("entrenar train"))
    words = shlex.split(resume.strip())[1:]
    assert main([*words[: words.index("--max-time-s")], "--max-steps", "3", "--max-time-s", "600"]) == 0


@pytest.mark.parametrize("words", [["--minutes", "0"], ["--text", "no-such-folder"], ["--seed", "-1"]])
def test_a_mistake_is_refused_before_anything_is_made(words, tmp_path, monkeypatch, capsys):
    """A wrong option is named, exit 2, and no folder of a run appears."""
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", *words]) == 2
    assert (words[1] if words[0] == "--text" else words[0]) in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
