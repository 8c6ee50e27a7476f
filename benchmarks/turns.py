"""Time workers in turns: each has its own process and one works at a time, so drift of the machine meets all alike."""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


class Worker:
    """A process that does one unit of work for each line it is sent and answers with a line of JSON."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def work(self) -> dict[str, Any]:
        """Do one unit; raise if the worker died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("work\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"worker {self.name} died with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the worker."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(work: Any) -> None:
    """In a worker: answer each line on stdin with `work()` as JSON."""
    for _ in sys.stdin:
        print(json.dumps(work()), flush=True)


def in_turns(workers: Sequence[Worker], rounds: int, warmup: int) -> dict[str, list[dict[str, Any]]]:
    """Let the workers work in turns; return each one's answers, the warm-up's left out."""
    answers: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    for number in range(warmup + rounds):
        for worker in workers:
            answer = worker.work()
            print(f"round {number - warmup:>2} {worker.name}: {answer}", file=sys.stderr, flush=True)
            if number >= warmup:
                answers[worker.name].append(answer)
    for worker in workers:
        worker.close()
    return answers


def peak_rss_bytes() -> int:
    """Return the kernel's own peak of this process's resident memory."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def rss_bytes() -> int:
    """Return this process's resident memory now."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) * 1024


def machine() -> dict[str, str]:
    """Say where and when a figure was measured."""
    import torch

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": f"{cpu}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median of the ratios taken pair by pair."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Keep the raw figures."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return path
