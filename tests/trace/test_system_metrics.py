"""The machine's readings are the kernel's; what is not there is absent."""

import os
import sys
import time
import types

import pytest

from entrenar.trace.system_metrics import SystemMetrics, read_gpu


@pytest.fixture
def machine(tmp_path):
    """A /proc and /sys of our own, and a clock."""
    files = {
        "proc/stat": "cpu  100 0 100 800 0 0 0 0 0 0\ncpu0 1 2 3\n",
        "proc/meminfo": "MemTotal: 4000 kB\nMemAvailable: 2000 kB\n",
        "proc/diskstats": " 254 0 vda 10 0 1000 0 10 0 2000 0 0 0 0\n 254 1 vda1 10 0 1000 0 10 0 2000 0 0 0 0\n",
        "sys/block/vda/size": "1",
        "sys/fs/cgroup/cpu.stat": "usage_usec 5\nthrottled_usec 1000000\n",
        "sys/class/thermal/thermal_zone0/temp": "41000\n",
        "sys/class/thermal/thermal_zone1/temp": "63500\n",
        "proc/7/status": "VmRSS: 900 kB\nRssAnon: 300 kB\n",
        "proc/7/schedstat": "5000000000 2000000000 9\n",
        "proc/8/status": "RssAnon: 200 kB\n",
    }

    def write(**changed: str) -> None:
        for name, text in {**files, **{key.replace("__", "/"): value for key, value in changed.items()}}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    write()
    now = [0]
    return write, now, SystemMetrics(lambda: [7, 8, 9], root=tmp_path, clock=lambda: now[0])


def test_gauges_come_at_once_and_rates_with_the_second_reading(machine):
    """Memory and temperature need one reading; a rate needs two."""
    _, _, metrics = machine
    values = {metric.name: metric.value for metric in metrics()}
    assert values == {
        "memory_available_bytes": 2000 * 1024, "memory_bytes": 500 * 1024, "cpu_temperature_c": 63.5,
    }  # fmt: skip


def test_rates_are_those_of_the_counters(machine):
    """Processor shares by ticks; steal, quota and run queue by time; a partition is not counted on top of its disk."""
    write, now, metrics = machine
    metrics()
    now[0] = 2_000_000_000
    write(**{
        "proc__stat": "cpu  150 0 110 860 20 0 0 60 0 0\n",
        "proc__diskstats": " 254 0 vda 10 0 1200 0 10 0 2400 0 0 0 0\n 254 1 vda1 10 0 1200 0 10 0 2400 0 0 0 0\n",
        "sys__fs__cgroup__cpu.stat": "throttled_usec 1500000\n",
        "proc__7__schedstat": "6000000000 2500000000 9\n",
    })  # fmt: skip
    values = {metric.name: metric.value for metric in metrics()}
    assert values["cpu_percent"] == pytest.approx(60.0)  # 200 ticks: 50 user, 10 system, 60 stolen; 60 idle, 20 waiting
    assert values["iowait_percent"] == pytest.approx(10.0)
    assert values["steal_percent"] == pytest.approx(30.0)
    assert values["disk_read_bytes_per_s"] == 200 * 512 / 2
    assert values["disk_write_bytes_per_s"] == 400 * 512 / 2
    assert values["throttled_percent"] == pytest.approx(25.0)
    assert values["runqueue_percent"] == pytest.approx(25.0)


def test_readings_come_once_a_second(machine):
    """Between two, nothing is read."""
    _, now, metrics = machine
    assert metrics()
    now[0] = 999_999_999
    assert metrics() == []
    now[0] = 1_000_000_000
    assert metrics()


def test_this_machine_has_readings():
    """On a real kernel: this process has memory, and burning a processor shows."""
    metrics = SystemMetrics(lambda: [os.getpid()], interval_ns=0)
    first = {metric.name: metric.value for metric in metrics()}
    until = time.process_time() + 0.2
    while time.process_time() < until:
        pass
    second = {metric.name: metric.value for metric in metrics()}
    assert first["memory_bytes"] > 1e6
    assert 0 < second["cpu_percent"] <= 100
    assert second["runqueue_percent"] >= 0


def test_a_device_without_a_sensor_lacks_that_reading():
    """What NVML refuses is left out; heat and power count as throttling, an idle clock does not."""

    class NVMLError(Exception):
        pass

    def refuse(*_):
        raise NVMLError

    nvml = types.SimpleNamespace(
        NVMLError=NVMLError, NVML_TEMPERATURE_GPU=0, NVML_CLOCK_SM=1,
        nvmlDeviceGetUtilizationRates=lambda _: types.SimpleNamespace(gpu=97),
        nvmlDeviceGetMemoryInfo=lambda _: types.SimpleNamespace(used=5 << 30),
        nvmlDeviceGetTemperature=lambda *_: 81, nvmlDeviceGetPowerUsage=refuse,
        nvmlDeviceGetClockInfo=lambda *_: 1410, nvmlDeviceGetCurrentClocksThrottleReasons=lambda _: 0x20,
    )  # fmt: skip
    assert read_gpu(nvml, None) == [
        ("utilization_percent", 97.0), ("memory_bytes", float(5 << 30)), ("temperature_c", 81.0),
        ("sm_clock_mhz", 1410.0), ("throttled", 1.0),
    ]  # fmt: skip
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda _: 0x1  # GPU idle
    assert ("throttled", 0.0) in read_gpu(nvml, None)


def test_a_library_without_a_driver_means_no_gpu(monkeypatch):
    """nvidia-ml-py on a machine without a device."""

    class NVMLError(Exception):
        pass

    def refuse():
        raise NVMLError

    monkeypatch.setitem(sys.modules, "pynvml", types.SimpleNamespace(NVMLError=NVMLError, nvmlInit=refuse))
    names = {metric.name for metric in SystemMetrics(lambda: [])()}
    assert not any(name.startswith("gpu") for name in names)
