"""Read what the machine does while a program is traced: processor, memory, disk, and GPU where there is one.

The tracer reads, never the traced program: once a second it costs less than a thousandth of a core. Everything comes
from /proc, /sys and NVIDIA's management library; what a machine does not have is absent, never zero.

    cpu_percent, iowait_percent, steal_percent        of all processors (steal: the hypervisor gave them to others)
    runqueue_percent                                  share of the second that the program's main threads waited for one
    throttled_percent                                 share of the second that the container's quota stopped it
    memory_bytes, memory_available_bytes              anonymous memory of the program; what the machine has left
    disk_read_bytes_per_s, disk_write_bytes_per_s     of all disks
    cpu_temperature_c                                 the hottest thermal zone
    gpuN.utilization_percent, gpuN.memory_bytes, gpuN.temperature_c, gpuN.power_w, gpuN.sm_clock_mhz
    gpuN.throttled                                    1 while the device slows down for heat or power, else 0
"""

import importlib
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from entrenar.trace.records import Metric

INTERVAL_NS = 1_000_000_000
_SECTOR_BYTES = 512
# Fields of the first line of /proc/stat, in ticks: user nice system idle iowait irq softirq steal.
_IDLE, _IOWAIT, _STEAL, _FIELDS = 3, 4, 7, 8
# NVML's bits for a clock that is held down by heat or by power (nvmlClocksEventReasons), not by an idle device.
_THROTTLE_REASONS = 0x0004 | 0x0008 | 0x0020 | 0x0040 | 0x0080


class SystemMetrics:
    """Returns readings when at least a second has passed since the last, else none.

    `pids` returns the processes of the traced program, those that are alive and those that are not. `root` is where
    /proc and /sys lie.
    """

    def __init__(
        self,
        pids: Callable[[], Iterable[int]],
        *,
        root: Path = Path("/"),
        clock: Callable[[], int] = time.monotonic_ns,
        interval_ns: int = INTERVAL_NS,
    ) -> None:
        self._pids, self._root, self._clock, self._interval_ns = pids, root, clock, interval_ns
        self._read_ns: int | None = None
        self._counters: dict[str, float] = {}
        self._gpus = _gpus()

    def __call__(self) -> list[Metric]:
        """Return what is due. Rates need two readings, so the first has none."""
        now = self._clock()
        if self._read_ns is not None and now - self._read_ns < self._interval_ns:
            return []
        elapsed_s = None if self._read_ns is None else (now - self._read_ns) / 1e9
        self._read_ns = now
        values = {**dict(self._gauges()), **self._rates(elapsed_s)}
        return [Metric(name, now, value) for name, value in values.items()]

    def _rates(self, elapsed_s: float | None) -> dict[str, float]:
        before, self._counters = self._counters, dict(self._counts())
        moved = {name: value - before[name] for name, value in self._counters.items() if name in before}
        if elapsed_s is None:
            return {}
        rates = {}
        if ticks := moved.get("ticks"):
            rates["cpu_percent"] = 100 * (1 - (moved["idle"] + moved["iowait"]) / ticks)
            rates["iowait_percent"] = 100 * moved["iowait"] / ticks
            rates["steal_percent"] = 100 * moved["steal"] / ticks
        for name in ("disk_read_bytes", "disk_write_bytes"):
            if name in moved:
                rates[f"{name}_per_s"] = moved[name] / elapsed_s
        if "throttled_s" in moved:
            rates["throttled_percent"] = 100 * moved["throttled_s"] / elapsed_s
        waits = [value for name, value in moved.items() if name.startswith("runqueue_s ") and value >= 0]
        if waits:
            rates["runqueue_percent"] = 100 * sum(waits) / elapsed_s
        return rates

    def _counts(self) -> Iterator[tuple[str, float]]:
        """Yield what only grows."""
        fields = self._first_words("proc/stat")
        if len(fields) > _FIELDS:
            ticks = [float(field) for field in fields[1 : _FIELDS + 1]]
            yield from (("ticks", sum(ticks)), ("idle", ticks[_IDLE]), ("iowait", ticks[_IOWAIT]))
            yield "steal", ticks[_STEAL]
        yield from self._disk_counts()
        for folder in ("sys/fs/cgroup", "sys/fs/cgroup/cpu"):
            for line in self._lines(f"{folder}/cpu.stat"):
                name, _, value = line.partition(" ")
                if name in ("throttled_usec", "throttled_time"):
                    yield "throttled_s", float(value) / (1e6 if name == "throttled_usec" else 1e9)
        for pid in self._pids():
            fields = self._first_words(f"proc/{pid}/schedstat")
            if len(fields) == 3:
                yield f"runqueue_s {pid}", float(fields[1]) / 1e9

    def _disk_counts(self) -> Iterator[tuple[str, float]]:
        disks = {path.name for path in self._root.joinpath("sys/block").glob("*") if not path.name.startswith("loop")}
        read = written = 0.0
        lines = [line.split() for line in self._lines("proc/diskstats")]
        own = [fields for fields in lines if len(fields) > 9 and fields[2] in disks]
        for fields in own:
            read += float(fields[5]) * _SECTOR_BYTES
            written += float(fields[9]) * _SECTOR_BYTES
        if own:
            yield from (("disk_read_bytes", read), ("disk_write_bytes", written))

    def _gauges(self) -> Iterator[tuple[str, float]]:
        for line in self._lines("proc/meminfo"):
            if line.startswith("MemAvailable:"):
                yield "memory_available_bytes", float(line.split()[1]) * 1024
        anonymous = [
            float(line.split()[1]) * 1024
            for pid in self._pids()
            for line in self._lines(f"proc/{pid}/status")
            if line.startswith("RssAnon:")
        ]
        if anonymous:
            yield "memory_bytes", sum(anonymous)
        zones = self._root.joinpath("sys/class/thermal").glob("thermal_zone*/temp")
        temperatures = [float(text) / 1000 for zone in zones for text in self._lines(str(zone))]
        if temperatures:
            yield "cpu_temperature_c", max(temperatures)
        for index, gpu in enumerate(self._gpus):
            yield from ((f"gpu{index}.{name}", value) for name, value in gpu())

    def _lines(self, path: str) -> list[str]:
        """Return the lines of a file of the kernel; none if it is not there, is not ours, or its process has ended."""
        try:
            return self._root.joinpath(path).read_text(encoding="ascii", errors="replace").splitlines()
        except OSError:
            return []

    def _first_words(self, path: str) -> list[str]:
        lines = self._lines(path)
        return lines[0].split() if lines else []


_Gpu = Callable[[], list[tuple[str, float]]]


def _gpus() -> list[_Gpu]:
    """Return one reader for each NVIDIA device; none without the library (`nvidia-ml-py`) or a driver."""
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return []
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError:
        return []
    return [partial(read_gpu, nvml, handle) for handle in handles]


def read_gpu(nvml: Any, handle: Any) -> list[tuple[str, float]]:
    """Return the readings of one device; those that it does not have are left out."""
    wanted: tuple[tuple[str, Callable[[], float]], ...] = (
        ("utilization_percent", lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
        ("memory_bytes", lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used),
        ("temperature_c", lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        ("power_w", lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
        ("sm_clock_mhz", lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
        ("throttled", lambda: bool(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle) & _THROTTLE_REASONS)),
    )
    readings = []
    for name, read in wanted:
        try:
            readings.append((name, float(read())))
        except nvml.NVMLError:
            continue
    return readings
