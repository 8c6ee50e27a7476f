"""`report.history`: the series that are drawn are those of metrics.jsonl, thinned without losing a spike."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar.errors import ConfigError, DataError
from entrenar.report.history import MAX_POINTS, differences, read_history, running_mean, thinned

from .conftest import record


def test_a_short_run_is_drawn_whole(make_run):
    """Every record is there, evaluations and seconds by phase too."""
    folder = make_run("a", [record(n, held_out={"loss": 2.0} if n % 5 == 0 else None) for n in range(1, 21)])
    history = read_history(folder)
    assert [one.step for one in history.records] == list(range(1, 21))
    assert [one.step for one in history.evaluations] == [5, 10, 15, 20]
    assert history.phase_s["forward"] == pytest.approx(20 * 0.08)
    assert history.config["optim"] == {"lr": 0.001}
    assert not history.is_cut


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=400), st.integers(4, 60))
def test_thinning_keeps_ends_and_extremes(values, limit):
    """At most `limit` points, in order, the first and last among them, and the highest and lowest value of all."""
    kept = thinned(values, limit)
    assert kept == sorted(set(kept))
    assert len(kept) <= max(limit, 1)
    assert {0, len(values) - 1} <= set(kept)
    finite = [value for value in values if math.isfinite(value)]
    shown = [values[index] for index in kept]
    if finite:
        assert min(finite) in shown
    if any(not math.isfinite(value) for value in values):
        assert any(not math.isfinite(value) for value in shown)
    elif finite:
        assert max(finite) in shown


def test_the_running_mean_starts_at_the_first_value():
    """A constant stays what it is, and a gap is stepped over."""
    assert running_mean([2.0, 2.0, math.nan, 2.0]) == pytest.approx([2.0] * 4)
    assert math.isnan(running_mean([math.nan])[0])
    rising = running_mean([0.0, 1.0])
    assert rising[1] == pytest.approx(0.2 / (1 - 0.8**2))


def test_a_hundred_thousand_records_are_a_few_thousand_points(make_run):
    """The page of a week's run stays small; its one spike is in it."""
    rows = [record(n, loss=99.0 if n == 54_321 else 2.0) for n in range(1, 100_001)]
    history = read_history(make_run("long", rows))
    assert len(history.records) <= MAX_POINTS
    assert 54_321 in [one.step for one in history.records]
    assert history.num_steps == 100_000


def test_what_differs_between_runs_is_listed(make_run):
    """Options with equal values are left out, missing ones are empty."""
    one = read_history(make_run("one", [record(1)], config='name = "one"\n[optim]\nlr = 0.001\n[train]\nseed = 1\n'))
    two = read_history(make_run("two", [record(1)], config='name = "two"\n[optim]\nlr = 0.002\n'))
    assert differences([one, two]) == [("optim.lr", ["0.001", "0.002"]), ("train.seed", ["1", ""])]


def test_a_cut_record_is_said(make_run):
    """What stands before the cut is shown."""
    folder = make_run("cut", [record(1), record(2)])
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(record(3))[:40])
    history = read_history(folder)
    assert history.is_cut
    assert history.num_steps == 2


def test_checkpoints_are_listed_with_what_their_manifests_say(make_run):
    """A damaged manifest costs its figures only."""
    folder = make_run("a", [record(1)])
    for step, text in ((10, '{"files": {"x": {"size": 7}}, "held_out_loss": 1.5, "git_revision": "abc"}'), (20, "{")):
        (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").write_text(text)
    first, second = read_history(folder).saved
    assert (first.step, first.size_bytes, first.held_out_loss, first.git_revision) == (10, 7, 1.5, "abc")
    assert (second.step, second.held_out_loss) == (20, None)


def test_a_folder_that_is_no_run_is_refused(tmp_path, make_run):
    """Each fault has its sentence."""
    with pytest.raises(DataError, match="is not a run's folder; `entrenar runs list` shows"):
        read_history(tmp_path / "nothing")
    with pytest.raises(DataError, match="has no recorded step"):
        read_history(make_run("empty", []))
    with pytest.raises(ConfigError, match=r"config\.toml cannot be read"):
        read_history(make_run("odd", [record(1)], config="= ="))
