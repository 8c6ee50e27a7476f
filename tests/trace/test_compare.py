"""A comparison of two runs tells what changed, and not what noise did."""

import random
import re

import pytest

from entrenar.trace.compare import as_json, compare, lines, ratio_interval
from entrenar.trace.records import Frame, Metric, SystemCall

from .build import MS, Built, write

PHASES = {"data": 5.0, "forward": 20.0, "backward": 40.0, "optimizer": 5.0}


@pytest.fixture
def compared(tmp_path):
    """Compare two programs."""

    def compared(one: Built, other: Built):
        with write(tmp_path / "one.sqlite", one) as before, write(tmp_path / "other.sqlite", other) as after:
            return compare(before, after)

    return compared


def test_the_same_program_twice_shows_no_change(compared):
    """Ten percent of noise in each span, another seed, no change."""
    for seed in range(10):
        comparison = compared(Built(PHASES, noise=0.1, seed=seed), Built(PHASES, noise=0.1, seed=100 + seed))
        assert comparison.changes == [], seed


def test_what_became_slower_is_told_first(compared):
    """Backward by a half, the loader twofold, with interval and total; steps follow from them."""
    comparison = compared(Built(PHASES, noise=0.1), Built(PHASES | {"backward": 60.0, "data": 10.0}, noise=0.1, seed=1))
    names = [change.name for change in comparison.changes]
    assert names[:3] == ["step", "backward", "data"]
    backward = comparison.changes[1]
    assert backward.low < 1.5 < backward.high
    assert backward.ratio == pytest.approx(1.5, rel=0.1)
    assert backward.total_ns == pytest.approx(60 * 20 * MS, rel=0.1)
    assert "forward" not in names
    text = lines(comparison)
    pattern = r"  phase backward: [\d.]+ms -> [\d.]+ms, 1.5\d times \([\d.]+ to [\d.]+\), \+1.[\d]+s in all"
    assert re.fullmatch(pattern, text[2])


def test_a_line_that_reads_longer_is_told(compared):
    """The system call and its function change along with the phase."""
    comparison = compared(Built(PHASES), Built(PHASES | {"data": 10.0}))
    told = {(change.kind, change.name) for change in comparison.changes}
    assert ("call", "pread64") in told
    assert ("line", "pread64 in data_block (data.py)") in told


def test_what_is_new_and_what_is_gone_is_told(compared):
    """A phase that only one run has."""
    comparison = compared(Built(PHASES), Built({"data": 5.0, "forward": 20.0, "backward": 40.0, "sync": 5.0}))
    text = "\n".join(lines(comparison))
    assert "sync: new, 60 times" in text
    assert "optimizer: gone, it was there 60 times" in text


def test_more_calls_are_a_change_though_each_is_as_fast(compared):
    """Twice the reads at the same speed."""
    twice = Built(PHASES)
    twice.calls += twice.calls
    comparison = compared(Built(PHASES), twice)
    told = {change.name: change for change in comparison.changes}
    assert (told["pread64"].before_count, told["pread64"].after_count) == (60, 120)


def test_a_small_change_is_not_worth_a_line(compared):
    """Two percent is below the ratio, a tenth of almost nothing below the share."""
    comparison = compared(Built(PHASES, noise=0.001), Built(PHASES | {"backward": 40.8}, noise=0.001))
    assert comparison.changes == []
    tiny = PHASES | {"mask": 0.01}
    assert compared(Built(tiny, noise=0.01), Built(tiny | {"mask": 0.02}, noise=0.01)).changes == []


def test_a_difference_within_the_tracers_own_time_is_none(tmp_path):
    """Where an empty call takes 20 µs, calls of 40 and of 55 µs are the same; of 40 and of 90 they are not."""

    def program(call_us: float) -> Built:
        built = Built({"forward": 1.0}, steps=1)
        call = SystemCall("close", 1, 1, 1000 * MS, round(call_us * 1000), 0, stack=(Frame("main", "/a/app.py", 3),))
        built.calls = [(call, None)] * 4000
        return built

    def told(call_us: float) -> set[str]:
        with (
            write(tmp_path / "one.sqlite", program(40), floor_ns=20_000) as before,
            write(tmp_path / "other.sqlite", program(call_us), floor_ns=20_000) as after,
        ):
            return {change.name for change in compare(before, after).changes}

    assert told(55) == set()
    assert told(90) == {"close", "close in main (app.py)"}


def test_a_busier_machine_is_told(compared):
    """A slower run on a machine that others used says so."""
    one, other = Built(PHASES), Built({name: 1.3 * value for name, value in PHASES.items()})
    one.metrics = [Metric("runqueue_percent", i, 1.0) for i in range(5)]
    other.metrics = [Metric("runqueue_percent", i, 24.0) for i in range(5)]
    assert "The machine differed: runqueue_percent 1.0 -> 24.0" in "\n".join(lines(compared(one, other)))


def test_the_interval_holds_the_truth():
    """In a thousandth of the cases at most the interval of a drifting series misses the true ratio."""
    generator = random.Random(0)
    misses = 0
    for _ in range(40):
        series = []
        for _ in range(2):
            drift, values = 0.0, []
            for _ in range(100):
                drift = 0.7 * drift + generator.gauss(0, 0.05)
                values.append(round(20 * MS * (1 + drift)))
            series.append(values)
        low, high = ratio_interval(*series, level=0.001, generator=generator)
        misses += not low <= 1.0 <= high
    assert misses == 0


def test_json_has_every_row(compared):
    """Changed or not, with interval and counts."""
    comparison = compared(Built(PHASES), Built(PHASES | {"data": 10.0}))
    rows = {(row["kind"], row["name"]): row for row in as_json(comparison)}
    assert len(rows) == len(comparison.rows)
    assert rows["phase", "data"]["changed"]
    assert not rows["phase", "forward"]["changed"]
    assert rows["phase", "data"]["interval"][0] > 1
