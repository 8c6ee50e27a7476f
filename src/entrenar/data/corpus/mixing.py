"""Choose a corpus for every sample so that shares are exact at any length, with one counter a corpus as state.

Drawing at random strays from the wanted shares by the square root of the number of draws. Here draw number t goes to
the corpus whose next sample is due first (earliest deadline first): sample j of a corpus with weight w of W may run
in draws floor(j·W/w) … ceil((j+1)·W/w) - 1. For one resource this schedule always exists and never strays by a whole
sample: |drawn - t·w/W| < 1 at every t (Baruah, Cohen, Plaxton and Varvel 1996, "Proportionate progress"). All
arithmetic is in integers.
"""

from collections.abc import Sequence

import numpy as np

_RESOLUTION = 1 << 20


def integer_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Scale weights to integers with about six digits."""
    total = sum(weights)
    return tuple(max(1, round(weight / total * _RESOLUTION)) for weight in weights)


def draw(weights: Sequence[int], drawn: Sequence[int], count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return which corpus each of the next `count` samples comes from, after `drawn` samples of each."""
    chosen = np.zeros(count, dtype=np.int64)
    if len(weights) == 1:
        return chosen
    total, counts = sum(weights), list(drawn)
    started = sum(counts)
    for step in range(count):
        due = (
            (-(-(counts[corpus] + 1) * total // weight), corpus)
            for corpus, weight in enumerate(weights)
            if counts[corpus] * total <= (started + step) * weight
        )
        _, corpus = min(due)
        counts[corpus] += 1
        chosen[step] = corpus
    return chosen
