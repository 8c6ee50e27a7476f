"""Means, spreads and how far a value lies from its past, shared by the training monitor and the anomaly detectors.

A value is judged against a window that does not hold it: a sample inside its own baseline hides itself, the more so
the shorter the window. The centre is the median and the spread the median absolute deviation, because one outlier
moves neither (Rousseeuw & Croux 1993, "Alternatives to the Median Absolute Deviation").
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# For normally distributed values 1.4826 * MAD estimates the standard deviation (1 / Phi^-1(3/4)).
_MAD_TO_SIGMA = 1.4826


@dataclass
class RunningStats:
    """Count, mean and variance of a stream in O(1) memory (Welford 1962)."""

    count: int = 0
    mean: float = 0.0
    _sum_of_squares: float = 0.0

    def add(self, value: float) -> None:
        """Take one more value into account."""
        self.count += 1
        deviation = value - self.mean
        self.mean += deviation / self.count
        self._sum_of_squares += deviation * (value - self.mean)

    @property
    def variance(self) -> float:
        """Sample variance (n - 1); 0 for fewer than two values."""
        return self._sum_of_squares / (self.count - 1) if self.count > 1 else 0.0

    @property
    def deviation(self) -> float:
        """Sample standard deviation."""
        return math.sqrt(self.variance)


def median_and_mad(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and the median absolute deviation from it.

    Raises: ValueError for no values.
    """
    if not values:
        raise ValueError("median_and_mad needs at least one value, got none")
    center = statistics.median(values)
    return center, statistics.median(abs(value - center) for value in values)


def robust_z(value: float, window: Sequence[float], *, relative_floor: float = 1e-3) -> float:
    """Return by how many standard deviations `value` lies above the median of `window` (which must exclude `value`).

    The spread is at least `relative_floor` times the median's size, so that a window of equal values does not
    turn the last digit into an outlier.
    """
    center, mad = median_and_mad(window)
    spread = max(_MAD_TO_SIGMA * mad, relative_floor * abs(center))
    if spread == 0.0:
        return 0.0 if value == center else math.copysign(math.inf, value - center)
    return (value - center) / spread
