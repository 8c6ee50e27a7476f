"""`runs`: a run's folder that another program, a later version or a crash left is shown, or refused with a sentence."""

import itertools
import json
import os

import pytest

from entrenar.cli.main import main

from ..report.conftest import record

COMMANDS = (["watch", "RUN"], ["report", "RUN"], ["runs", "show", "RUN"], ["runs", "list", "--runs-dir", "RUNS"])
VALUES = (
    None,
    "text",
    "\x1b[2J",
    True,
    -1,
    10**400,
    1e308,
    float("nan"),
    float("-inf"),
    [],
    [1],
    {},
    {"loss": "x"},
    {"a": 1},
)
EVENT = {"step": 1, "kind": "loss_spike", "message": "m"}


def shown(folder, words, capsys) -> tuple[int, str]:
    code = main([str(folder) if word == "RUN" else str(folder.parent) if word == "RUNS" else word for word in words])
    return code, capsys.readouterr().err


def run_of(tmp_path, metrics: str, events: str = ""):
    folder = tmp_path / "a"
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text(metrics)
    (folder / "events.jsonl").write_text(events)
    (folder / "config.toml").write_text('name = "a"\n')
    return folder


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("kind", ["metrics", "events"])
def test_no_value_of_a_record_brings_a_traceback(tmp_path, capsys, words, kind):
    """Each field with values of every kind: shown, or one of our own errors that names the file."""
    good = record(1, eta_s=1.0, epoch=0.5, held_out={"loss": 2.0}) if kind == "metrics" else EVENT
    wrong = []
    for name, value in itertools.product(good, VALUES):
        line = json.dumps(good | {name: value}) + "\n"
        plain = json.dumps(record(1)) + "\n"
        folder = run_of(tmp_path, plain + line if kind == "metrics" else plain, line if kind == "events" else "")
        code, said = shown(folder, words, capsys)
        if code not in (0, 2) or (code == 2 and f"{kind}.jsonl" not in said):
            wrong.append((name, value, code, said))
    assert wrong == []


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("content", ["", "{", "null\n", "[]\n" * 3, "[" * 100_000 + "\n", "\x00\n", '{"step": 1}'])
def test_a_half_written_file_is_no_traceback(tmp_path, capsys, words, content):
    """Whatever a crash left of it."""
    assert shown(run_of(tmp_path, content, content), words, capsys)[0] in (0, 2)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_not_waited_for(tmp_path, capsys, words):
    """There are no records in it."""
    folder = run_of(tmp_path, "")
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    (folder / "events.jsonl").unlink()
    (folder / "events.jsonl").mkdir()
    assert shown(folder, words, capsys)[0] in (0, 2)


def test_an_evaluation_that_was_not_finite_is_shown(tmp_path, capsys):
    """Its loss is null in the file; the best evaluation is another."""
    rows = [record(1, held_out={"loss": None}), record(2, held_out={"loss": 2.0}), record(3, held_out={"loss": None})]
    folder = run_of(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    for words in COMMANDS:
        assert shown(folder, words, capsys)[0] == 0
    main(["runs", "show", str(folder)])
    assert "best held-out  2.0000" in capsys.readouterr().out
