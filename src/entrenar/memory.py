"""Read how much memory there is: what this process holds, what limits it, and amounts that people write."""

import math
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from entrenar.errors import ConfigError

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BINARY_UNITS = {"k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryLimit:
    """The memory limit of a process, and what sets that limit."""

    size_bytes: int
    source: str


def parse_bytes(text: str, what: str = "memory") -> int:
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
        raise ConfigError(f"{what} must be an amount above 0 with its unit, such as 6GB or 512MiB, got {text!r}")
    return size


def status_bytes(name: str, pid: int | str = "self") -> int:
    """Return a figure that the kernel keeps of a process: VmRSS, VmHWM (its peak), VmData; 0 if the process is gone."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def memory_limit() -> MemoryLimit:
    """Return the tightest limit on this process's memory; what it holds already counts."""
    return min(_limits(), key=lambda limit: limit.size_bytes)


def free_bytes() -> int:
    """Return how much more memory this process may take."""
    return memory_limit().size_bytes - status_bytes("VmRSS")


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
