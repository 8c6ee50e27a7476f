"""Measure what this machine has for a run: memory, and how fast it multiplies and moves numbers."""

import math
import re
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from entrenar.config import AnyConfig
from entrenar.errors import ConfigError
from entrenar.ops import fastest_compute_dtype

ConfigT = TypeVar("ConfigT", bound=AnyConfig)

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BINARY_UNITS = {"k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
_CGROUPS = Path("/sys/fs/cgroup")
_SIDE = 1024
_REPEATS = 4
_ADDED = 1 << 22


@dataclass(frozen=True)
class MemoryLimit:
    """The memory limit of a process, and what sets that limit."""

    size_bytes: int
    source: str


def parse_bytes(text: str) -> int:
    """Read an amount of memory with its unit, such as 6GB, 512 MiB or 24g.

    Raises:
        ConfigError: it is no such amount.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b)\s*", text.lower())
    size = 0
    if found is not None:
        units = _BINARY_UNITS if found[3] else _UNITS
        wanted = float(found[1]) * units[found[2] or ""]
        size = int(wanted) if math.isfinite(wanted) else 0
    if size <= 0:
        raise ConfigError(f"memory must be an amount above 0 with its unit, such as 6GB or 512MiB, got {text!r}")
    return size


def status_bytes(name: str) -> int:
    """Return a figure that the kernel keeps of this process: VmRSS, VmHWM (its peak), RssFile."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def memory_limit() -> MemoryLimit:
    """Return the tightest limit on this process's memory; what it holds already counts."""
    return min(_limits(), key=lambda limit: limit.size_bytes)


def _limits() -> Iterator[MemoryLimit]:
    own = status_bytes("VmRSS")
    meminfo = Path("/proc/meminfo").read_text(encoding="ascii")
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo, re.MULTILINE)
    if found:
        yield MemoryLimit(int(found[1]) * 1024 + own, "memory that is available now")
    for name, kind in (("RLIMIT_AS", resource.RLIMIT_AS), ("RLIMIT_DATA", resource.RLIMIT_DATA)):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            yield MemoryLimit(soft, f"the limit {name} of this process")
    yield from cgroup_limits(_CGROUPS, Path("/proc/self/cgroup"), own)


def cgroup_limits(root: Path, own_groups: Path, own_bytes: int) -> Iterator[MemoryLimit]:
    """Yield what the control groups above this process leave it, for cgroup versions 1 and 2."""
    for line in own_groups.read_text(encoding="ascii").splitlines() if own_groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        is_memory = "memory" in controllers.split(",")
        if controllers and not is_memory:
            continue
        base = root / "memory" if is_memory else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if is_memory else ("memory.max", "memory.current")
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            limit, usage = (_number(folder / name) for name in names)
            if limit is not None and limit < 1 << 62:
                yield MemoryLimit(limit - max((usage or 0) - own_bytes, 0), f"the control group {folder}")
            if folder == base:
                break


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # not there, or "max": no limit
        return None


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
