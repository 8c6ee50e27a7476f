"""`entrenar quality` on a tree: scores, gates and their exit codes, in the specification's own spelling."""

import json
import subprocess
import sys

import pytest

from entrenar.cli.main import main

GOOD = '"""Good."""\n\n\ndef double(x: int) -> int:\n    """Give twice."""\n    return 2 * x\n'
BRANCHES = "".join(
    f"    if x == {n}:\n        for i in range(x):\n            if i:\n                print({n})\n" for n in range(9)
)
BAD = f"def worse(x):\n{BRANCHES}    return x\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A clean project of two files, which git does not know."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "good.py").write_text(GOOD)
    (tmp_path / "pkg" / "other.py").write_text(GOOD.replace("double", "twice"))
    return tmp_path


def quality(*words):
    return main(["quality", *words])


def test_a_tree_is_scored(project, capsys):
    """Score, grade, files."""
    assert quality("tdg", "pkg") == 0
    assert "score 100.0 A+   2 files" in capsys.readouterr().out


def test_explain_gives_formula_line_and_cost(project, capsys):
    """What each finding cost, most first."""
    (project / "pkg" / "bad.py").write_text(BAD)
    assert quality("tdg", "pkg/bad.py", "--explain") == 0
    out = capsys.readouterr().out
    assert "Formula 1: a finding owes" in out
    assert "line 1: worse: cognitive complexity" in out


def test_functions_are_ranked(project, capsys):
    """Worst first, with file and line."""
    (project / "pkg" / "bad.py").write_text(BAD)
    assert quality("tdg", "pkg", "--functions", "--worst", "1") == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("pkg/bad.py:1 worse")


def test_json_and_sarif_hold_the_findings(project, capsys):
    """The same ones in both; SARIF with lines that exist."""
    (project / "pkg" / "bad.py").write_text(BAD)
    assert quality("tdg", "pkg", "--format", "json", "--explain") == 0
    table = json.loads(capsys.readouterr().out)
    findings = [row for file in table["files"] for row in file["findings"]]
    assert set(table) == {"schema", "scorer", "score", "files", "not_measured", "generated", "formula"}
    assert quality("tdg", "pkg", "--format", "sarif", "--output", "out/debt.sarif") == 0
    run = json.loads((project / "out" / "debt.sarif").read_text())["runs"][0]
    assert [row["ruleId"] for row in run["results"]] == [row["rule"] for row in findings]
    assert {row["level"] for row in run["results"]} >= {"note", "error"}
    known = {rule["id"] for rule in run["tool"]["driver"]["rules"]}
    assert {row["ruleId"] for row in run["results"]} <= known


def test_the_output_is_the_same_twice(project, capsys):
    """No clock, no order of a set."""
    (project / "pkg" / "bad.py").write_text(BAD)
    outs = set()
    for _ in range(2):
        quality("tdg", "pkg", "--format", "json")
        outs.add(capsys.readouterr().out)
    assert len(outs) == 1


def test_a_gap_is_told_and_ends_with_5(project, capsys):
    """A file that cannot be read has no score; the rest is scored."""
    (project / "pkg" / "broken.py").write_text("def f(:\n")
    assert quality("tdg", "pkg") == 5
    out = capsys.readouterr()
    assert "not measured pkg/broken.py:1: syntax error" in out.out
    assert "1 of 3 files have no score" in out.err
    assert quality("check-quality", "--path", "pkg", "--min-grade", "A") == 5
    assert quality("tdg", "pkg", "--exclude", "pkg/broken.py") == 0


@pytest.mark.parametrize("path", ["empty", "nowhere", "pkg/good.txt"])
def test_a_tree_without_python_is_the_user_s_fault(project, path, capsys):
    """Exit code 2, with the path."""
    (project / "empty").mkdir()
    assert quality("tdg", path) == 2
    assert path in capsys.readouterr().err


def test_a_tree_without_code_is_not_measured(project):
    """Exit code 5: no score, not a perfect one."""
    (project / "empty").mkdir()
    (project / "empty" / "a.py").touch()
    assert quality("tdg", "empty") == 5


@pytest.mark.parametrize("spelling", [["check-quality"], ["tdg", "check-quality"]])
def test_check_quality_passes_the_good_and_fails_the_planted(project, spelling, capsys):
    """Both spellings; without --fail-on-violation it only tells."""
    words = [*spelling, "--path", "pkg", "--min-grade", "A"]
    assert quality(*words, "--fail-on-violation") == 0
    (project / "pkg" / "bad.py").write_text(BAD)
    assert quality(*words) == 0
    assert "FAIL pkg/bad.py" in capsys.readouterr().out
    assert quality(*words, "--fail-on-violation") == 1


def test_check_quality_without_a_demand_is_refused(project, capsys):
    """A gate that demands nothing cannot fail."""
    assert quality("check-quality", "--path", "pkg") == 2
    assert "no grade is demanded" in capsys.readouterr().err
    assert quality("check-quality", "--path", "pkg", "--min-grade", "a") == 2


def test_llama_s_grade_decides_the_exit_code(project):
    """A file at A passes `llama_min_grade = "A"` and fails A+."""
    (project / ".pmat").mkdir()
    (project / "pkg" / "llama.py").write_text(GOOD.replace('"""Good."""\n', "") + "\n\ndef f(x):\n    return x\n" * 9)
    for grade, code in (("B", 0), ("A+", 1)):
        (project / ".pmat" / "tdg-rules.toml").write_text(
            f'llama_min_grade = "{grade}"\n[paths]\nllama = ["*/llama.py"]\n'
        )
        assert quality("check-quality", "--path", "pkg", "--fail-on-violation") == code


@pytest.mark.parametrize("prefix", [[], ["tdg"]])
def test_a_baseline_is_made_and_held(project, prefix, capsys):
    """Unchanged: 0. Worse: 1 with the flag, 0 without. The two files of the same tree are equal."""
    create = [*prefix, "baseline", "create", "--path", "pkg", "--output"]
    assert quality(*create, ".pmat/one.json") == 0
    assert quality(*create, ".pmat/two.json") == 0
    assert (project / ".pmat/one.json").read_bytes() == (project / ".pmat/two.json").read_bytes()
    words = [*prefix, "check-regression", "--baseline", ".pmat/one.json", "--path", "pkg", "--max-score-drop", "5.0"]
    assert quality(*words, "--fail-on-regression") == 0
    (project / "pkg" / "good.py").write_text(GOOD + BAD)
    assert quality(*words) == 0
    assert "FAIL pkg/good.py" in capsys.readouterr().out
    assert quality(*words, "--fail-on-regression") == 1
    assert "`entrenar quality tdg --explain pkg` says what costs most" in capsys.readouterr().err


def test_the_baseline_s_own_path_is_the_default(project, capsys):
    """Made of pkg, compared with pkg; new and removed files are told."""
    assert quality("baseline", "create", "--path", "pkg") == 0
    (project / "pkg" / "other.py").rename(project / "pkg" / "moved.py")
    assert quality("check-regression", "--fail-on-regression") == 0
    out = capsys.readouterr().out
    assert "pkg/moved.py: new, 100.00" in out
    assert "no longer there: pkg/other.py" in out


def test_a_baseline_by_another_scorer_is_refused(project, capsys):
    """Exit code 2: neither passed nor failed."""
    quality("baseline", "create", "--path", "pkg")
    place = project / ".pmat" / "tdg-baseline.json"
    place.write_text(place.read_text().replace('"formula": "1"', '"formula": "0"'))
    assert quality("check-regression", "--fail-on-regression") == 2
    assert "formula 0 then, 1 now" in capsys.readouterr().err


@pytest.mark.parametrize("drop", ["-1", "101", "nan"])
def test_an_impossible_drop_is_refused(project, drop):
    """A limit that nothing could pass, or everything."""
    quality("baseline", "create", "--path", "pkg")
    assert quality("check-regression", "--max-score-drop", drop) == 2


def test_git_context_names_commit_and_changes(project, capsys):
    """Commit, branch, hash of what is uncommitted; without git it is the user's fault."""
    assert quality("tdg", "pkg", "--with-git-context") == 2
    for words in (["init", "-q", "-b", "trunk"], ["add", "."],
                  ["-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "-qm", "m"]):  # fmt: skip
        subprocess.run(["git", *words], check=True)
    (project / "pkg" / "good.py").write_text(GOOD + "\n")
    capsys.readouterr()
    assert quality("tdg", "pkg", "--with-git-context", "--format", "json") == 0
    context = json.loads(capsys.readouterr().out)["git"]
    assert context["branch"] == "trunk"
    assert len(context["commit"]) == 40
    assert len(context["dirty"]) == 64


def test_the_verbs_load_no_torch(project):
    """Nor hypothesis: any tree can be scored, before a commit, in a moment."""
    code = "import sys\nfrom entrenar.cli.main import main\nmain(['quality', 'tdg', 'pkg'])\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "hypothesis", "pytest"} & set(done.stdout.splitlines()[-1].split())
