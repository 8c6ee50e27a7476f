"""`entrenar quality gate` and `figure`: one table, and the exit code of the worst verdict."""

import json
import subprocess

import pytest

from entrenar.cli.main import main

GATE = """
[[gate]]
name = "{name}"
tiers = [1]
phases = ["p1"]
run = "{run}"
fix = "repair it"
expect = "planted"
[[gate.plant]]
file = "mark"
text = "planted"
"""


@pytest.fixture
def project(tmp_path):
    """A repository; call it with the gates to write."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "quality").mkdir()
    (tmp_path / "mark").write_text("fine\n")

    def write(**runs):
        text = "".join(GATE.format(name=name, run=run) for name, run in runs.items())
        (tmp_path / "quality" / "gates.toml").write_text(text)
        return tmp_path

    return write


def gate(folder, *words):
    return main(["quality", "--project", str(folder), "gate", *words])


@pytest.mark.parametrize(
    ("runs", "code"),
    [
        ({"a": "true"}, 0),
        ({"a": "true", "b": "no-such-program"}, 5),
        ({"a": "no-such-program", "b": "false"}, 1),
    ],
)
def test_the_worst_verdict_is_the_exit_code(project, runs, code, capsys):
    """A failure outweighs what was not measured, and that outweighs a pass."""
    assert gate(project(**runs), "--tier", "1", "--format", "json") == code
    table = json.loads(capsys.readouterr().out)
    assert table["verdict"] == {0: "passed", 1: "failed", 5: "not measured"}[code]


def test_the_selftest_ends_with_1_if_a_gate_is_blind(project, capsys):
    """One that reads the file notices; `true` never does."""
    seeing = "python -c 'import sys; t = open(sys.argv[1]).read(); print(t); sys.exit(len(t) != 5)' mark"
    assert gate(project(a=seeing), "--selftest") == 0
    assert "each of 1 gates noticed its violation" in capsys.readouterr().out
    assert gate(project(a=seeing, b="true"), "--selftest") == 1
    assert "BLIND   b" in capsys.readouterr().out


def test_gates_are_listed_without_running(project, capsys):
    """Names, commands, bounds."""
    assert gate(project(a="false"), "--list") == 0
    assert "a: false (exit code 0)" in capsys.readouterr().out


def test_a_tier_without_gates_is_refused(project):
    """Nothing run is nothing passed."""
    assert gate(project(a="true"), "--phase", "p4") == 2


RESULTS = {"runs": {"a": 3, "b": 5}, "list": [1.5, 2.5], "ok": True, "text": "x", "zero": 0}


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("runs.*", "--least", "3"), 0),
        (("runs.*", "--least", "4"), 1),
        (("runs.*", "--most", "4"), 1),
        (("runs.*", "--most", "5"), 0),
        (("list.1", "--least", "2.5"), 0),
        (("list.-1", "--most", "2"), 1),
        (("ok", "--least", "1"), 0),
        (("runs.a", "--over", "runs.b", "--most", "0.6"), 0),
        (("runs.a", "--over", "runs.b", "--most", "0.5"), 1),
        (("runs.a", "--over", "zero", "--most", "1"), 2),
        (("runs.c", "--least", "0"), 5),
        (("list.7", "--least", "0"), 5),
        (("text", "--least", "0"), 2),
        (("runs.a",), 2),
        (("runs.a", "--least", "1", "--most", "9"), 2),
    ],
)
def test_a_figure_is_held_against_its_bound(tmp_path, words, code):
    """The worst of all that the place names; what is not there is not measured."""
    (tmp_path / "r.json").write_text(json.dumps(RESULTS))
    assert main(["quality", "--project", str(tmp_path), "figure", "r.json", *words]) == code


def test_a_file_of_figures_that_is_missing_is_not_measured(tmp_path, capsys):
    """Exit code 5."""
    assert main(["quality", "--project", str(tmp_path), "figure", "r.json", "a", "--least", "0"]) == 5
    assert "was not measured" in capsys.readouterr().err
