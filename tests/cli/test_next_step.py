"""The last line of a command that has made something is a command that can be typed (`cli.next_step`)."""

import shlex
from pathlib import Path

import pytest

from entrenar.cli.main import main
from entrenar.cli.next_step import generate_command, resume_command
from entrenar.train.signals import StopSignals

from ..small import small_corpus

SMALL = [
    "--batch-size", "2", "--seq-len", "16", "--vocab-size", "300", "--hidden-size", "32", "--num-layers", "1",
    "--num-heads", "2", "--intermediate-size", "64", "--max-seq-len", "32", "--eval-every", "0", "--threads", "1",
]  # fmt: skip


def next_words(out: str) -> list[str]:
    """The words of the command in the last line."""
    last = out.strip().splitlines()[-1]
    assert last.startswith("Next: entrenar ")
    return [word if word != "TEXT" else "def" for word in shlex.split(last)[2:]]


@pytest.fixture
def corpus(tmp_path):
    """A small corpus in a folder whose name needs quotes."""
    (tmp_path / "my data").mkdir()
    return small_corpus(tmp_path / "my data")


def test_each_next_command_works(corpus, tmp_path, capsys):
    """Train, then what it says; convert the run, then what that says."""
    runs = tmp_path / "my runs"
    assert main(["train", "--corpus", str(corpus), "--runs-dir", str(runs), "--max-steps", "1", *SMALL]) == 0
    assert main(next_words(capsys.readouterr().out)) == 0
    capsys.readouterr()
    assert main(["convert", str(runs / "run"), str(tmp_path / "a model"), "--to", "hf"]) == 0
    assert main(next_words(capsys.readouterr().out)) == 0


def test_an_interrupted_run_says_how_it_goes_on(corpus, tmp_path, capsys, monkeypatch):
    """The command continues exactly this run, without its config file or its other flags."""
    enter = StopSignals.__enter__

    def enter_late(self):
        entered = enter(self)
        self.requested = "SIGINT"
        return entered

    monkeypatch.setattr(StopSignals, "__enter__", enter_late)
    words = ["train", "--corpus", str(corpus), "--runs-dir", str(tmp_path), "--name", "mine", "--max-steps", "3"]
    assert main([*words, *SMALL]) == 0
    out = capsys.readouterr().out
    assert "Training interrupted" in out
    monkeypatch.undo()
    resume = next_words(out)
    assert resume == ["train", "--resume", "--name", "mine", "--runs-dir", str(tmp_path)]
    assert main(resume) == 0
    assert "Training complete!" in capsys.readouterr().out


def test_what_is_prepared_is_what_train_is_told_to_take(tmp_path, capsys):
    """The corpus that was written, quoted."""
    (tmp_path / "text.txt").write_text("one two three\n" * 400)
    out = tmp_path / "my corpus"
    assert main(["prepare", str(tmp_path / "text.txt"), "--out", str(out), "--vocab-size", "270"]) == 0
    assert next_words(capsys.readouterr().out) == ["train", "--corpus", str(out)]


def test_a_run_in_its_usual_place_needs_no_folder():
    """`runs` is the default."""
    assert resume_command("finetune", Path("runs/mine")) == "entrenar finetune --resume --name mine"
    assert generate_command(Path("runs/mine")) == "entrenar generate runs/mine --prompt TEXT"


def test_a_run_that_may_be_there_is_begun_or_continued(corpus, tmp_path, capsys):
    """One command for a scheduler that starts jobs again: the second start takes no step twice."""
    words = ["train", "--corpus", str(corpus), "--runs-dir", str(tmp_path), "--resume-if-any", *SMALL]
    assert main([*words, "--max-steps", "1"]) == 0
    assert "Loading checkpoint" not in capsys.readouterr().out
    assert main([*words, "--max-steps", "2"]) == 0
    out = capsys.readouterr().out
    assert "Loading checkpoint" in out
    assert "step 2" in out
    assert "step 1 " not in out


@pytest.mark.parametrize("other", ["--resume", "--overwrite"])
def test_two_ways_to_begin_exclude_each_other(corpus, tmp_path, capsys, other):
    """Whichever was meant, the other would be ignored."""
    words = ["train", "--corpus", str(corpus), "--runs-dir", str(tmp_path), "--resume-if-any", *SMALL]
    assert main([*words, "--max-steps", "1"]) == 0
    assert main([*words, other]) == 2
    assert "--resume-if-any excludes --resume and --overwrite" in capsys.readouterr().err
