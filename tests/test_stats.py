"""Running moments equal the batch formulas, and robust deviations are not moved by the outlier they look for."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar.stats import RunningStats, median_and_mad, robust_z

numbers = st.floats(min_value=-1e6, max_value=1e6)


@pytest.mark.property
@pytest.mark.kills("stats", "self.mean += deviation / self.count", "self.mean += deviation / (self.count + 1)")
@given(st.lists(numbers, min_size=2, max_size=40))
def test_running_stats_equal_the_batch_formulas(values: list[float]) -> None:
    """Mean, variance and deviation of a stream are those of the list."""
    running = RunningStats()
    for value in values:
        running.add(value)
    scale = max(abs(value) for value in values) + 1.0
    assert running.count == len(values)
    assert math.isclose(running.mean, statistics.fmean(values), abs_tol=1e-12 * scale)
    assert math.isclose(running.variance, statistics.variance(values), rel_tol=1e-9, abs_tol=1e-12 * scale**2)
    assert running.deviation == math.sqrt(running.variance)


def test_running_stats_survive_a_large_offset() -> None:
    """The variance of small differences on a large mean is not lost to cancellation."""
    running = RunningStats()
    for value in (1e9 + 4, 1e9 + 7, 1e9 + 13, 1e9 + 16):
        running.add(value)
    assert running.variance == pytest.approx(30.0, rel=1e-9)


def test_running_stats_of_nothing_and_of_one_value_have_no_variance() -> None:
    """Zero and one values give variance 0."""
    running = RunningStats()
    assert (running.mean, running.variance) == (0.0, 0.0)
    running.add(5.0)
    assert (running.mean, running.variance) == (5.0, 0.0)


def test_median_and_mad_by_hand() -> None:
    """1 1 2 2 4 6 9 has median 2 and deviations 1 1 0 0 2 4 7, whose median is 1."""
    assert median_and_mad([1, 1, 2, 2, 4, 6, 9]) == (2, 1)


def test_median_and_mad_of_nothing_is_refused() -> None:
    """No values have no median."""
    with pytest.raises(ValueError, match="needs at least one value, got none"):
        median_and_mad([])


def test_robust_z_is_in_standard_deviations() -> None:
    """On a normal sample, two standard deviations above the mean is near 2."""
    normal = statistics.NormalDist(10.0, 3.0)
    sample = [normal.inv_cdf((i + 0.5) / 1000) for i in range(1000)]
    assert robust_z(16.0, sample) == pytest.approx(2.0, abs=0.01)
    assert robust_z(4.0, sample) == pytest.approx(-2.0, abs=0.01)


def test_one_outlier_in_the_window_does_not_hide_the_next() -> None:
    """A window with one huge value still shows a huge value; mean and deviation would call it usual."""
    window = [1.0, 1.1, 0.9, 1.05, 0.95, 1e6]
    assert robust_z(1e6, window) > 1e6
    assert (1e6 - statistics.fmean(window)) / statistics.stdev(window) < 3


def test_a_constant_window_does_not_cry_at_the_last_digit() -> None:
    """With no spread, deviations are measured against a part of the median; around zero anything else is infinite."""
    assert robust_z(2.001, [2.0] * 8) == pytest.approx(0.5)
    assert robust_z(3.0, [2.0] * 8, relative_floor=0.1) == pytest.approx(5.0)
    assert robust_z(0.0, [0.0] * 8) == 0.0
    assert robust_z(-1.0, [0.0] * 8) == -math.inf
