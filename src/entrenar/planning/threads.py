"""Choose how many threads a run takes, by measuring: next to another busy process fewer may be faster.

A parallel region ends when its last thread does. A thread that waits for a processor makes all others wait, in each of
the hundreds of small regions of a step, so on two cores with one other busy process a step on two threads was seen to
take three times as long as on a quiet machine, and sometimes eleven times.
"""

import statistics
import time

import torch

_ROWS, _WIDTH = 2048, 256
_ROUNDS = 3
_MARGIN = 0.9  # fewer threads must be this much faster: a quiet moment may not last, and neither may a busy one


def fastest_threads() -> int:
    """Return the number of threads on which small products run fastest now: torch's own number, or one.

    Takes about a second; torch's setting is as before afterwards.
    """
    usual = torch.get_num_threads()
    if usual == 1:
        return 1
    x, weight = torch.ones(_ROWS, _WIDTH), torch.ones(_WIDTH, _WIDTH)
    elapsed_s: dict[int, list[float]] = {usual: [], 1: []}
    try:
        for _ in range(_ROUNDS):
            for threads, found in elapsed_s.items():
                torch.set_num_threads(threads)
                found.append(_seconds(x, weight))
    finally:
        torch.set_num_threads(usual)
    return 1 if statistics.median(elapsed_s[1]) < _MARGIN * statistics.median(elapsed_s[usual]) else usual


def _seconds(x: torch.Tensor, weight: torch.Tensor) -> float:
    """Time a chain of many small parallel regions, as a step of a small model is one."""
    started = time.perf_counter()
    for _ in range(10):
        x = torch.nn.functional.silu(x @ weight).mul_(1 / _WIDTH).add_(1.0)
    return time.perf_counter() - started
