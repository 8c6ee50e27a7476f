"""A run's folder says what each of its sessions ran on (`recipe.sessions`), and the report shows it."""

import platform

import pytest
import torch

from entrenar import recipe
from entrenar.config_file import load_config
from entrenar.recipe.sessions import recorded_session
from entrenar.report import read_history, render
from entrenar.runs import RunFolder, read_records
from entrenar.train import World

from ..small import small_corpus, small_run

CPU = torch.device("cpu")


def test_each_session_leaves_what_it_ran_on(tmp_path):
    """Two lines for each session: versions and machine, and the peak of memory; the report shows them."""
    made = small_run(small_corpus(tmp_path), tmp_path / "runs")
    recipe.train(load_config(None, made | {"train.max_steps": "1"}))
    recipe.train(load_config(None, made | {"train.max_steps": "2"}), resume=True)
    run = tmp_path / "runs" / "first"
    lines = list(read_records(RunFolder(run).sessions))
    assert [line["event"] for line in lines] == ["begun", "ended"] * 2
    assert lines[0]["python"] == platform.python_version()
    assert lines[0]["torch"] == torch.__version__
    assert lines[0]["threads"] == 1
    assert lines[1]["peak_bytes"] > 10_000_000
    page = render([read_history(run)])
    assert f"python {platform.python_version()}" in page
    assert "GB of memory" in page


def test_a_session_that_ends_with_an_error_has_no_end(tmp_path):
    """Its beginning stays, and the error comes through."""
    with pytest.raises(RuntimeError, match="stopped"), recorded_session(RunFolder(tmp_path), CPU, World.alone()):
        raise RuntimeError("stopped")
    assert [line["event"] for line in read_records(RunFolder(tmp_path).sessions)] == ["begun"]


def test_no_run_ends_because_its_peak_cannot_be_noted(tmp_path, caplog):
    """A folder that is gone at the end is a warning: the run itself has saved what it learned."""
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    with recorded_session(run, CPU, World.alone()):
        run.sessions.unlink()
        run.path.rmdir()
    assert f"cannot write {run.sessions}" in caplog.text


def test_a_run_of_an_earlier_version_has_no_environment(tmp_path):
    """Nothing is made up."""
    recipe.train(load_config(None, small_run(small_corpus(tmp_path), tmp_path / "runs", train__max_steps="1")))
    run = tmp_path / "runs" / "first"
    RunFolder(run).sessions.unlink()
    assert "<summary>Environment</summary>" not in render([read_history(run)])
