"""Measure what tests gain by drawing a tensor whole instead of number by number: `python benchmarks/test_data.py`.

Each way draws the same number of examples of each shape in turn, in one process on one thread; what counts is processor
time, so other work on the machine disturbs little. The gain is the median of the ratios of neighbors in time, its
interval the 95 % bootstrap of that median.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from hypothesis.extra import numpy as hnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.turns import machine, write_result
from tests.strategies import tensors

ROUNDS, EXAMPLES = 11, 5
SHAPES = {"2 x 8": (2, 8), "2 x 4 x 8 x 8": (2, 4, 8, 8)}
QUIET = settings(
    max_examples=EXAMPLES, phases=(Phase.generate,), database=None, deadline=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def ways(shape: tuple[int, ...]) -> dict[str, st.SearchStrategy[Any]]:
    """Return the strategies that draw a float32 tensor of a shape."""
    numbers = st.floats(-100, 100, width=32)
    return {
        "whole": tensors(*shape, dtype=torch.float32),
        "arrays": hnp.arrays("float32", shape, elements=numbers).map(torch.from_numpy),
        "element by element": hnp.arrays("float32", shape, elements=numbers, fill=st.nothing()).map(torch.from_numpy),
    }


def drawing(strategy: st.SearchStrategy[Any]) -> Callable[[], float]:
    """Return a function that draws EXAMPLES and says how many milliseconds of processor time one took."""

    @QUIET
    @given(strategy)
    def draw(_: Any) -> None:
        pass

    def timed() -> float:
        started = time.process_time()
        draw()
        return (time.process_time() - started) / EXAMPLES * 1e3

    return timed


def interval(ratios: list[float]) -> list[float]:
    """Return the median and its 95 % bootstrap interval."""
    generator = random.Random(0)  # noqa: S311 - resampling
    medians = sorted(statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(2000))
    return [round(value, 2) for value in (statistics.median(ratios), medians[50], medians[1949])]


def measure(shape: tuple[int, ...]) -> dict[str, Any]:
    """Let the ways draw in turns."""
    timers = {name: drawing(strategy) for name, strategy in ways(shape).items()}
    for name in list(timers):
        try:
            timers[name]()  # the first draw imports
        except Unsatisfiable:  # more numbers than hypothesis lets one example hold
            del timers[name]
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(ROUNDS):
        for name, timer in timers.items():
            times[name].append(timer())
    gains = {
        name: interval([slow / fast for slow, fast in zip(spent, times["whole"], strict=True)])
        for name, spent in times.items()
        if name != "whole"
    }
    return {"ms": {name: round(statistics.median(spent), 3) for name, spent in times.items()}, "gain": gains}


def main() -> None:
    """Measure every shape and keep the figures."""
    torch.set_num_threads(1)
    measured = {name: measure(shape) for name, shape in SHAPES.items()}
    for name, figures in measured.items():
        print(name, figures)
    write_result("test_data", {"shapes": measured, "rounds": ROUNDS, "examples": EXAMPLES, **machine()})


if __name__ == "__main__":
    main()
