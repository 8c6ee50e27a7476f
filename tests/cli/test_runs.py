"""`entrenar runs`: lists, shows, compares and deletes, without torch."""

import io
import json
import subprocess
import sys

import pytest

from entrenar.cli.main import main

from ..report.conftest import record

CONFIG = 'name = "{name}"\n[optim]\nlr = {lr}\n[train]\nmax_steps = 2\n'


@pytest.fixture
def runs_dir(tmp_path):
    """Two complete runs that differ in their rate, and the folder of something else."""
    for name, lr in (("one", 0.001), ("two", 0.01)):
        folder = tmp_path / name
        folder.mkdir()
        rows = [record(n, held_out={"loss": 2.5}) for n in (1, 2)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "config.toml").write_text(CONFIG.format(name=name, lr=lr))
    (tmp_path / "other").mkdir()
    return tmp_path


def run(capsys, *words) -> str:
    assert main(["runs", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_all_runs_are_listed_with_how_they_ended(runs_dir, capsys):
    """A line each; as JSON the same; a folder without runs says how to make one."""
    out = run(capsys, "list", "--runs-dir", runs_dir)
    assert out.splitlines()[0].split()[0] == "run"
    assert [line.split()[0] for line in out.splitlines()[1:3]] in (["one", "two"], ["two", "one"])
    assert out.count("complete") == 2
    assert "Next: entrenar runs show" in out
    listed = json.loads(run(capsys, "list", "--runs-dir", runs_dir, "--json"))
    assert sorted(one["name"] for one in listed) == ["one", "two"]
    assert listed[0]["best_held_out_loss"] == 2.5
    assert "`entrenar quickstart` makes the first one" in run(capsys, "list", "--runs-dir", runs_dir / "other")


def test_without_an_action_the_runs_here_are_listed(runs_dir, capsys, monkeypatch):
    """`entrenar runs` alone is what most people want."""
    monkeypatch.chdir(runs_dir)
    assert "No runs in runs" in run(capsys)


def test_one_run_is_shown_with_its_findings(runs_dir, capsys):
    """By name or by path, in words or as JSON."""
    out = run(capsys, "show", "one", "--runs-dir", runs_dir)
    assert "how it ended   complete" in out
    assert "checkpoint     none" in out
    assert f"Next: entrenar report {runs_dir / 'one'}" in out
    (shown,) = json.loads(run(capsys, "show", runs_dir / "one", "--json"))
    assert shown["steps"] == 2


def test_runs_are_compared_by_figures_and_settings(runs_dir, capsys):
    """Only settings that differ are shown."""
    out = run(capsys, "compare", "one", "two", "--runs-dir", runs_dir)
    assert "optim.lr                     0.001  |  0.01" in out
    assert "train.max_steps" not in out
    assert json.loads(run(capsys, "compare", "one", "two", "--runs-dir", runs_dir, "--json"))["differences"] == {
        "optim.lr": ["0.001", "0.01"]
    }
    assert "The settings do not differ." in run(capsys, "compare", "one", "one", "--runs-dir", runs_dir)


def test_a_run_is_deleted_after_a_yes(runs_dir, capsys, monkeypatch):
    """Where nobody can be asked, --yes is needed; on a terminal anything but yes keeps it."""
    assert main(["runs", "rm", "one", "--runs-dir", str(runs_dir)]) == 2
    assert "give --yes where nobody can be asked" in capsys.readouterr().err

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for answer, is_there in (("n\n", True), ("\n", True), ("y\n", False)):
        monkeypatch.setattr("sys.stdin", Terminal(answer))
        run(capsys, "rm", "one", "--runs-dir", runs_dir)
        assert (runs_dir / "one").exists() == is_there
    run(capsys, "rm", "two", "--yes", "--runs-dir", runs_dir)
    assert not (runs_dir / "two").exists()


def test_a_name_that_does_not_exist_is_answered_with_those_that_do(runs_dir, capsys):
    """Exit 2, for every action."""
    for action in ("show", "compare", "rm"):
        assert main(["runs", action, "thre", "--runs-dir", str(runs_dir)]) == 2
        assert "has no run 'thre'; the runs there are:" in capsys.readouterr().err


def test_it_answers_without_torch(runs_dir):
    """Looking at runs costs a fraction of a second."""
    program = (
        f"import sys; from entrenar.cli.main import main; main(['runs', 'list', '--runs-dir', {str(runs_dir)!r}]); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
