"""`report.overview`: every folder of runs can be listed, whatever lies in it."""

import json
import shutil

import pytest

from entrenar import locks
from entrenar.errors import ConfigError, DataError, MachineError
from entrenar.report.overview import describe, find_run, list_runs, remove

from .conftest import record

LIMITS = 'name = "a"\n[train]\nmax_steps = 10\n'


def test_a_run_is_told_by_its_figures(make_run):
    """Steps, time, the best held-out loss and the newest checkpoint are those in the folder."""
    rows = [record(n, held_out={"loss": 9.0 - n} if n in (4, 8) else None) for n in range(1, 11)]
    folder = make_run("a", rows, config=LIMITS)
    (folder / "checkpoints" / "step-00000010").mkdir(parents=True)
    one = describe(folder)
    assert (one.name, one.kind, one.status, one.steps) == ("a", "pre-training", "complete", 10)
    assert (one.best_held_out_loss, one.checkpoint, one.elapsed_s) == (1.0, 10, 2.0)


@pytest.mark.parametrize(
    ("config", "records", "events", "status"),
    [
        (LIMITS, [1, 2, 3], (), "stopped at step 3"),
        (LIMITS, [], (), "no step was taken"),
        ("name = ", [1, 2], (), "cannot be read: "),
        ("[train]\nmax_time_s = 0.3\n", [1, 2], (), "complete"),
        ("[train]\nepochs = 3\n", [1, 2], (), "stopped at step 2"),
        (
            LIMITS,
            [1, 2],
            [{"step": 3, "kind": "non_finite", "message": "loss is nan"}],
            "stopped by an alarm at step 2",
        ),
        (LIMITS, [1, 2, 9], [{"step": 1, "kind": "non_finite", "message": "skipped"}], "stopped at step 9"),
    ],
)
def test_the_ending_is_told_in_words(make_run, config, records, events, status):
    """Complete, stopped, stopped by an alarm, without a step, or not to be read: never an error."""
    one = describe(make_run("a", [record(n) for n in records], events, config))
    assert one.status.startswith(status)


def test_a_run_that_is_under_way_is_told(make_run, tmp_path):
    """Its lock says so, and it is not deleted."""
    folder = make_run("a", [record(1)], config=LIMITS)
    with locks.held(folder / ".lock", "a"):
        assert describe(folder).status == "runs now"
        with pytest.raises(MachineError, match="is in use by process"):
            remove(folder)
    assert describe(folder).status == "stopped at step 1"
    remove(folder)
    assert list_runs(tmp_path) == []


def test_what_is_no_run_is_not_listed_and_not_deleted(make_run, tmp_path):
    """Other folders, files and links stay; a record of another program is listed with the reason."""
    make_run("a", [{"step": 1, "other": True}])
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert [one.name for one in list_runs(tmp_path)] in (["a", "link"], ["link", "a"])
    assert all("cannot be read" in one.status for one in list_runs(tmp_path))
    for name in ("notes", "file", "link", "nothing"):
        with pytest.raises(ConfigError, match="is not a run's folder, so nothing in it is deleted"):
            remove(tmp_path / name)
    assert list_runs(tmp_path / "nothing") == []


def test_a_run_is_found_by_name_and_by_path(make_run, tmp_path, monkeypatch):
    """A name that does not exist is answered with those that do."""
    folder = make_run("a", [record(1)])
    assert find_run(tmp_path, "a") == folder
    assert find_run(tmp_path / "elsewhere", str(folder)) == folder
    shutil.copytree(folder, tmp_path / "b")
    with pytest.raises(DataError, match=r"has no run 'c'; the runs there are: [ab], [ab]"):
        find_run(tmp_path, "c")
    with pytest.raises(DataError, match="the runs there are: none"):
        find_run(tmp_path / "elsewhere", "c")


def test_a_loss_that_is_not_finite_is_no_figure(make_run):
    """What is printed as JSON is JSON."""
    folder = make_run("a", [record(1, loss=None)], config=LIMITS)
    one = describe(folder)
    assert one.loss is None
    assert "NaN" not in json.dumps(vars(one))
