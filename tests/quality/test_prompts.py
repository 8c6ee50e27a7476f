"""Prompts: strict variables, facts that were measured or say that they were not, commands that exist."""

import json

import pytest

from entrenar.cli.main import main
from entrenar.errors import ConfigError, FormatError
from entrenar.quality.prompts.library import Prompt, fill, library

WORKFLOW = [
    "code-coverage", "debug", "quality-enforcement", "security-audit", "continue", "assert-cmd-testing",
    "mutation-testing", "performance-optimization", "refactor-hotspots", "clean-repo-cruft", "documentation",
]  # fmt: skip
WORSE = "def worse(x):\n" + "".join(f"    if x == {n}:\n        print({n})\n" for n in range(12))
MUTANT = {
    "file": "src/a.py", "line": 3, "function": "worse", "operator": "o", "code": "c", "original": "0", "mutated": "1",
    "occurrence": 1, "status": "survived",
}  # fmt: skip


@pytest.fixture
def project(tmp_path):
    """One file with debt; nothing measured yet."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.py").write_text(WORSE)
    return tmp_path


def prompt(project, *words):
    return main(["quality", "--project", str(project), "prompt", *words])


def test_there_are_eleven_workflow_prompts(project, capsys):
    """By the names of the original."""
    assert prompt(project, "--list") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == WORKFLOW


def test_what_is_set_stands_in_the_text(project, capsys):
    """The specification's own call, both values."""
    words = ["code-coverage", "--set", "TEST_CMD=pytest -q pkg", "--set", "COVERAGE_CMD=coverage run -m pytest"]
    assert prompt(project, *words, "--format", "text") == 0
    out = capsys.readouterr().out
    assert "$ pytest -q pkg\n" in out
    assert "$ coverage run -m pytest\n" in out
    assert prompt(project, "debug", "--set", "ISSUE=Gradients explode {{ 7 * 7 }}", "--format", "json") == 0
    assert "Gradients explode {{ 7 * 7 }}" in json.loads(capsys.readouterr().out)["text"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("debug",), "needs ISSUE: pass --set ISSUE=VALUE"),
        (("debug", "--set", "ISSUES=x"), "has no variable 'ISSUES'; it has ISSUE, TEST_CMD"),
        (("debug", "--set", "ISSUE"), "--set needs KEY=VALUE"),
        (("debug", "--set", "ISSUE=a", "--set", "ISSUE=b"), "each key once"),
        (("debugg",), "no prompt 'debugg'; there are code-coverage"),
        ((), "give the name of a prompt, or --list"),
        (("debug", "--list"), "give the name of a prompt, or --list"),
    ],
)
def test_what_is_not_understood_is_refused(project, words, message, capsys):
    """Unknown or missing: exit code 2."""
    assert prompt(project, *words) == 2
    assert message in capsys.readouterr().err


def test_hot_spots_are_those_of_the_file(project, capsys):
    """With line, score and what costs."""
    assert prompt(project, "refactor-hotspots", "--set", "TARGET_FILE=src/a.py") == 0
    assert "src/a.py:1 worse: " in capsys.readouterr().out


def test_what_was_not_measured_says_so(project, capsys):
    """Never a made-up fact."""
    assert prompt(project, "mutation-testing", "--set", "TARGET_FILE=src/a.py") == 0
    assert "not measured (quality/results/mutation.json is missing); run `entrenar" in capsys.readouterr().out
    assert prompt(project, "code-coverage") == 0
    assert "run `make coverage`" in capsys.readouterr().out
    assert prompt(project, "refactor-hotspots", "--set", "TARGET_FILE=src/none.py") == 0
    assert "must be a Python file or a folder" in capsys.readouterr().out


def test_survivors_and_missing_lines_are_facts(project, capsys):
    """From the files that the measurements wrote."""
    results = project / "quality" / "results"
    results.mkdir(parents=True)
    (results / "mutation.json").write_text(json.dumps({"operators_version": 1, "mutants": [MUTANT]}))
    summary = {"num_statements": 9, "covered_lines": 7, "num_branches": 0, "covered_branches": 0}
    files = {"src/a.py": {"summary": summary, "missing_lines": [4, 7]}}
    (project / "coverage.json").write_text(json.dumps({"meta": {"branch_coverage": True}, "files": files}))
    prompt(project, "mutation-testing", "--set", "TARGET_FILE=src/a.py")
    assert "src/a.py:3 worse: '0' became '1'" in capsys.readouterr().out
    prompt(project, "code-coverage")
    assert "src/a.py: lines 4, 7" in capsys.readouterr().out
    prompt(project, "code-coverage", "--set", "TARGET=lib")
    assert "not measured: lib is not in coverage.json" in capsys.readouterr().out
    prompt(project, "mutation-testing", "--set", "TARGET_FILE=src/b.py")
    assert "not measured: no mutant of src/b.py was tried" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompts: [", "holds no prompts"),
        ("other: 1", "holds no prompts"),
        ("- 1", "holds no prompts"),
        ("prompts: [{name: a, title: b}]", "a prompt has name, text, title, variables"),
        ("prompts: [{name: a, title: b, text: c, more: d}]", "a prompt has"),
        ("prompts: [{name: debug, title: b, text: c}]", "another prompt 'debug'"),
        ("prompts: !!python/object/apply:os.getcwd []", "holds no prompts"),
    ],
)
def test_bad_prompts_are_refused(project, text, message):
    """Damaged, incomplete, of a name that is taken, with code in it."""
    (project / "prompts").mkdir()
    (project / "prompts" / "own.yaml").write_text(text)
    with pytest.raises((FormatError, ConfigError), match=message):
        library(project)


def test_prompts_that_are_no_text_are_refused(project):
    """The encoding is stated."""
    (project / "prompts").mkdir()
    (project / "prompts" / "own.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="must be UTF-8"):
        library(project)


@pytest.mark.parametrize("text", ["{{ MISSING }}", "{% if %}", "{{ ''.__class__.__mro__ }}", "{{ facts.nothing() }}"])
def test_a_template_that_cannot_be_filled_is_refused(project, text):
    """An undeclared variable, bad syntax, an escape from the sandbox."""
    with pytest.raises(FormatError, match="cannot be filled in"):
        fill(Prompt("p", "t", {}, text), {}, project)
