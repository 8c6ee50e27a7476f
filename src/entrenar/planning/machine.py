"""Measure what this machine has for a run: memory, and how fast it multiplies and moves numbers."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

from entrenar.config import AnyConfig
from entrenar.ops import fastest_compute_dtype

ConfigT = TypeVar("ConfigT", bound=AnyConfig)

_SIDE = 1024
_REPEATS = 4
_ADDED = 1 << 22


@dataclass(frozen=True)
class Rates:
    """The machine's measured speed with the current number of threads."""

    flops_per_s: float
    bytes_per_s: float

    def seconds(self, flops: int, moved_bytes: int) -> float:
        """Return how long products and then all other operations take."""
        return flops / self.flops_per_s + moved_bytes / self.bytes_per_s


def measure_rates(dtype: torch.dtype) -> Rates:
    """Measure products of matrices in `dtype`, and sums written to memory; takes a fraction of a second."""
    matrix = torch.ones(_SIDE, _SIDE, dtype=dtype)
    product = _least_s(lambda: torch.mm(matrix, matrix))
    one, other, total = (torch.ones(_ADDED) for _ in range(3))
    moving = _least_s(lambda: torch.add(one, other, out=total))
    return Rates(2 * _SIDE**3 / product, 3 * one.nbytes / moving)


def _least_s(work: Callable[[], object]) -> float:
    times = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def settle_compute_dtype(config: ConfigT, device: torch.device, recorded: Mapping[str, Any] | None = None) -> ConfigT:
    """Replace "auto" in compute_dtype and muon_dtype by what is fastest here, or by what a resumed run `recorded`.

    Another dtype would change the last bits, so it is measured once in the life of a run.
    """
    changes: dict[str, Any] = {}
    if config.compute_dtype == "auto":
        stored = getattr(torch, config.train.precision)
        changes["compute_dtype"] = recorded["compute_dtype"] if recorded else _fastest(stored, device)
    optim = config.optim
    if optim.optimizer == "muon" and optim.muon_dtype == "auto":
        before = recorded and recorded["optim"].get("muon_dtype", "bfloat16")  # all that earlier versions had
        changes["optim"] = optim.model_copy(update={"muon_dtype": before or _fastest(torch.bfloat16, device)})
    # mypy takes the copy of a union's member for the union.
    return cast(ConfigT, config.model_copy(update=changes)) if changes else config


def _fastest(stored: torch.dtype, device: torch.device) -> str:
    return str(fastest_compute_dtype(stored, device)).removeprefix("torch.")
