"""`entrenar quality` gates a tree by its own floors, and its exit code is the verdict."""

import json

import pytest

from entrenar.cli.main import main

RISK = """
[whole]
line = 90
branch = 80

[[component]]
name = "toy"
files = ["toy.py"]
line = 95
mutation = {floor}
critical = true
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "quality").mkdir()
    (tmp_path / "toy.py").write_text("def double(x):\n    return x * 2\n\n\ndef half(x):\n    return x / 2\n")
    (tmp_path / "tests" / "test_toy.py").write_text(
        "from toy import double, half\n\n\ndef test_double():\n    assert double(3) == 6\n\n\n"
        "def test_half():\n    assert half(0) == 0\n"
    )
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    (tmp_path / "quality" / "risk.toml").write_text(RISK.format(floor=50))
    return tmp_path


def quality(project, *words: str) -> int:
    return main(["quality", "--project", str(project), *words])


def test_a_half_tested_project_scores_half(project, capsys):
    """`half` is tested where it cannot fail: its mutants survive, and the gate says so until they are argued."""
    assert quality(project, "mutate") == 0
    said = capsys.readouterr().out
    assert "toy.py:2: KILLED by test_double (2 → 3)" in said
    assert "Mutation Score: 55.6% (5 killed / 9 total)" in said
    assert "Target: 50% - PASS ✅" in said
    assert quality(project, "mutate", "--known-only", "--fail-on-threshold") == 1
    assert "toy.py:6: survived: return x / 2 (2 → 3); kill it, or argue it" in capsys.readouterr().err
    (project / "quality" / "risk.toml").write_text(RISK.format(floor=95))
    assert quality(project, "mutate", "--known-only", "--fail-on-threshold") == 1
    assert "toy.py: mutation score 55.56 %, at least 95 % wanted" in capsys.readouterr().err
    assert (
        quality(project, "mutate", "--known-only", "--failures-only", "--target", "toy", "--output-format", "json") == 0
    )
    table = json.loads(capsys.readouterr().out)
    assert (table["total_mutants"], table["killed"], table["mutation_score"]) == (9, 5, 55.56)


def test_a_target_needs_no_table(project, capsys):
    """The specification's own line: a target, a threshold, failures only, and the exit code."""
    (project / "quality" / "risk.toml").unlink()
    words = ["mutate", "--target", "toy.py", "--threshold", "80", "--failures-only", "--fail-on-threshold"]
    assert quality(project, *words) == 1
    said = capsys.readouterr()
    assert "KILLED" not in said.out
    assert "Target: 80% - FAIL ❌" in said.out
    assert "toy.py: mutation score 55.56 %, at least 80 % wanted" in said.err
    assert quality(project, "mutate") == 2
    assert "--target FILE is needed" in capsys.readouterr().err


@pytest.mark.parametrize(("covered", "code"), [(100, 0), (94, 1)])
def test_a_doctored_coverage_file_fails(project, covered, code, capsys):
    """One percent less than the floor is an exit code of 1, critical or not."""
    counts = {"num_statements": 100, "covered_lines": covered, "num_branches": 10, "covered_branches": 10}
    path = project / "coverage.json"
    path.write_text(json.dumps({"meta": {"branch_coverage": True}, "files": {"toy.py": {"summary": counts}}}))
    assert quality(project, "risk", "--coverage", str(path)) == code
    assert quality(project, "risk", "--coverage", str(path), "--critical") == code
    said = capsys.readouterr()
    assert ("FAIL" in said.out) is bool(code)
    assert ("toy.py: line 94.00 %, at least 95 % wanted" in said.err) is bool(code)
