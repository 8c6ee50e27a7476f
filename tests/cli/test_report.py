"""`entrenar report`: the page is written where it is said to be."""

import json

import pytest

from entrenar.cli.main import main

from ..report.conftest import record


@pytest.fixture
def run_dir(tmp_path):
    """A run of two steps."""
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record(n)) + "\n" for n in (1, 2)))
    return folder


def test_a_page_is_written_into_the_runs_folder(run_dir, tmp_path, capsys):
    """Without --out it is report.html of the first run; with it, that file."""
    assert main(["report", str(run_dir)]) == 0
    assert str(run_dir / "report.html") in capsys.readouterr().out
    assert "<canvas" not in (run_dir / "report.html").read_text()
    assert main(["report", str(run_dir), str(run_dir), "--out", str(tmp_path / "both.html")]) == 0
    assert "What differs" not in (tmp_path / "both.html").read_text()


def test_a_run_is_found_by_its_name(run_dir, tmp_path):
    """In the folder of runs."""
    assert main(["report", "a", "--runs-dir", str(tmp_path / "runs")]) == 0
    assert (run_dir / "report.html").is_file()


def test_a_run_that_is_not_there_is_refused(run_dir, tmp_path, capsys):
    """Exit 2, with the runs that are there."""
    assert main(["report", str(tmp_path / "nothing"), "--runs-dir", str(tmp_path / "runs")]) == 2
    assert "nothing'; the runs there are: a" in capsys.readouterr().err
