"""History: scores at commits without a checkout, in the specification's own words, down to its jq programs."""

import json
import shutil
import subprocess

import pytest

from entrenar.cli.main import main

GOOD = '"""Good."""\n\n\ndef double(x: int) -> int:\n    """Give twice."""\n    return 2 * x\n'
WORSE = GOOD + "\n\ndef worse(x):\n" + "".join(f"    if x == {n}:\n        print({n})\n" for n in range(40))
SUBJECT = 'say "hi" \\ $(x) \u2028 caf\u00e9'
JQ = (".history[] | {commit, score: .score.grade}", '.history[] | select(.score.grade | test("C|D|F"))')


def run(folder, *words):
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    return subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def project(tmp_path, monkeypatch):
    """Good, worse, gone, good again; tags on the way."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    run(tmp_path, "init", "-q", "-b", "trunk")
    (tmp_path / "pkg").mkdir()
    (tmp_path / "readme").touch()
    run(tmp_path, "add", ".")
    run(tmp_path, "commit", "-qm", "empty")
    for text, tag in ((GOOD, "baseline-v1"), (WORSE, "checkpoint-epoch-100"), (None, "gone"), (GOOD, "optimized-v2")):
        if text is None:
            (tmp_path / "pkg" / "a.py").unlink()
        else:
            (tmp_path / "pkg").mkdir(exist_ok=True)
            (tmp_path / "pkg" / "a.py").write_text(text)
        run(tmp_path, "add", "-A", ".")
        run(tmp_path, "commit", "-qm", SUBJECT)
        run(tmp_path, "tag", tag)
    return tmp_path


def history(capsys, *words, code=0):
    capsys.readouterr()
    assert main(["quality", "tdg", "history", *words]) == code
    return capsys.readouterr()


def rows(capsys, *words, code=0):
    return json.loads(history(capsys, *words, "--format", "json", code=code).out)["history"]


def test_a_range_is_scored_commit_by_commit(project, capsys):
    """Oldest first, with the change against the one before; where the path is gone there is no score."""
    found = rows(capsys, "--range", "baseline-v1..optimized-v2", "--path", "pkg")
    assert [row["score"]["grade"] for row in found] == ["B-", "not measured", "A+"]
    assert [row["score"]["total"] is None for row in found] == [False, True, False]
    assert found[2]["change"] == pytest.approx(100 - found[0]["score"]["total"])
    assert found[0]["subject"] == SUBJECT


def test_nothing_is_checked_out(project, capsys):
    """The work tree, its changes and the index are as before."""
    (project / "pkg" / "a.py").write_text("x = (")
    before = run(project, "status", "--porcelain")
    rows(capsys, "--since", "HEAD~3", "--path", "pkg/a.py")
    assert run(project, "status", "--porcelain") == before
    assert (project / "pkg" / "a.py").read_text() == "x = ("


@pytest.mark.parametrize("name", ["checkpoint-epoch-100", "HEAD~2", "optimized-v2~2"])
def test_a_tag_or_expression_is_one_commit(project, capsys, name):
    """Under the name it was asked for by."""
    (row,) = rows(capsys, "--commit", name, "--path", "pkg/a.py")
    assert row["name"] == name
    assert row["commit"] == run(project, "rev-parse", name).strip()
    assert row["score"]["grade"] == "B-"


def checkpoint(project, name, revision):
    folder = project / "runs" / name / "checkpoints" / "step-00000100"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"git_revision": revision}))
    return folder


@pytest.mark.parametrize("name", ["step-00000100", "checkpoint-100", "runs/one/checkpoints/step-00000100"])
def test_a_checkpoint_is_found_by_its_manifest(project, capsys, name):
    """By its folder, or its name below the runs; changes on top are told."""
    commit = run(project, "rev-parse", "checkpoint-epoch-100").strip()
    checkpoint(project, "one", f"{commit}+dirty")
    (row,) = rows(capsys, "--commit", name, "--path", "pkg")
    assert (row["commit"], row["score"]["grade"]) == (commit, "B-")
    assert row["name"] == f"{name} (and changes that were not committed)"


def test_a_checkpoint_that_cannot_be_found_is_refused(project, capsys):
    """Ambiguous, damaged, without a revision, unknown."""
    words = ("--commit", "step-00000100", "--path", "pkg")
    assert "nor is there a checkpoint" in history(capsys, *words, code=2).err
    folder = checkpoint(project, "one", None)
    assert "names no git revision" in history(capsys, *words, code=2).err
    (folder / "manifest.json").write_text("{")
    assert "is not valid JSON" in history(capsys, *words, code=2).err
    (folder / "manifest.json").write_text("[]")
    assert "has no readable manifest" in history(capsys, *words, code=2).err
    checkpoint(project, "two", None)
    assert "names 2 checkpoints" in history(capsys, *words, code=2).err


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
@pytest.mark.parametrize(("program", "count"), [(JQ[0], 3), (JQ[1], 0)])
def test_the_specification_s_jq_programs_run_as_written(project, capsys, program, count):
    """On a history with a hostile subject and a commit without a score."""
    text = history(capsys, "--since", "HEAD~3", "--path", "pkg", "--format", "json").out
    done = subprocess.run(["jq", "-c", program], input=text, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == count


@pytest.mark.skipif(shutil.which("jq") is None, reason="jq is not installed")
def test_the_jq_program_finds_when_quality_dropped(project, capsys):
    """A commit that is a D is selected."""
    nested = "    for i in x:\n        for j in i:\n            for k in j:\n                k = k or i() or j()\n"
    (project / "pkg" / "a.py").write_text(WORSE + nested * 9)
    run(project, "commit", "-qam", "bad")
    text = history(capsys, "--since", "HEAD~2", "--path", "pkg", "--format", "json").out
    done = subprocess.run(["jq", "-r", f"{JQ[1]} | .subject"], input=text, capture_output=True, text=True, check=True)
    assert done.stdout == "bad\n"


def test_a_path_without_code_is_not_measured(project, capsys):
    """Exit code 5: an answer of nothing is no answer."""
    assert "has no Python code" in history(capsys, "--commit", "HEAD", "--path", "nowhere", code=5).err


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--range", "nowhere..HEAD"], "git cannot list"), (["--since", "HEAD~99"], "git knows no commit"),
     (["--range", "HEAD..HEAD"], "holds no commit"), (["--commit", "nowhere"], "git knows no commit")],
)  # fmt: skip
def test_unknown_revisions_are_refused(project, capsys, words, message):
    """Exit code 2, in git's words."""
    assert message in history(capsys, *words, code=2).err


def test_without_git_history_is_refused(tmp_path, monkeypatch, capsys):
    """A folder that is in no repository."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert "must lie in a git repository" in history(capsys, "--commit", "HEAD", code=2).err


def test_a_shallow_clone_scores_what_it_has(project, capsys, tmp_path, monkeypatch):
    """And says what to do about the rest."""
    run(tmp_path, "-c", "protocol.file.allow=always", "clone", "-q", "--depth", "1", f"file://{project}", "clone")
    monkeypatch.chdir(tmp_path / "clone")
    (row,) = rows(capsys, "--commit", "HEAD", "--path", "pkg")
    assert row["score"]["grade"] == "A+"
    assert "git fetch --unshallow" in history(capsys, "--since", "HEAD~1", code=2).err


def test_a_detached_head_is_a_commit(project, capsys):
    """And odd file names are names."""
    (project / "pkg" / 'a "b"\n$(c).py').write_text(GOOD)
    run(project, "add", ".")
    run(project, "commit", "-qm", "odd")
    run(project, "checkout", "-q", "--detach")
    (row,) = rows(capsys, "--commit", "HEAD", "--path", "pkg")
    assert row["files"] == 2


def test_only_commits_that_touch_the_path_can_be_asked_for(project, capsys):
    """Of four, those that change the file."""
    (project / "readme").write_text("more")
    run(project, "commit", "-qam", "other")
    assert len(rows(capsys, "--since", "HEAD~4", "--path", "pkg", "--touching")) == 3


@pytest.mark.parametrize("name", ["out/history.png", "history.svg"])
def test_the_scores_are_drawn(project, capsys, name):
    """A picture in the format that the name asks for."""
    history(capsys, "--since", "baseline-v1", "--path", "pkg", "--plot", name)
    start = (project / name).read_bytes()[:60]
    assert start.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")


def test_the_text_names_change_and_gaps(project, capsys):
    """A line a commit."""
    (project / "pkg" / "b.py").write_text("x = (")
    run(project, "add", ".")
    run(project, "commit", "-qm", "broken")
    out = history(capsys, "--since", "HEAD~2", "--path", "pkg").out.splitlines()
    assert '100.00         A+  say "hi" \\ $(x) ? café' in out[0]
    assert "+0.00 A+" in out[1]
    assert out[1].endswith("broken  (1 files without a score)")
