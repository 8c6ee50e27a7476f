"""How fast ranks add up tensors: the time of a small sum, and the rate of a large one.

`measure_link` is asked by every rank of a world. `measure_loopback` starts two processes of this machine and asks them.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass

import torch

from entrenar.errors import MachineError
from entrenar.scale.ranks import joined
from entrenar.train import World

_SMALL_SUMS, _LARGE_SUMS, _LARGE_BYTES = 200, 7, 16 << 20
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Link:
    """What a sum over ranks takes.

    Attributes:
        bytes_per_s: what each rank sends in a second while it takes part in a large sum.
        latency_s: what a sum of a single number takes, from call to answer.
    """

    bytes_per_s: float
    latency_s: float

    def sum_s(self, ranks: int, tensors: int, size_bytes: int) -> float:
        """Return how long `ranks` take to add up so many tensors of so many bytes in all, one after the other."""
        return 0.0 if ranks == 1 else tensors * self.latency_s + sent_bytes(ranks, size_bytes) / self.bytes_per_s


def sent_bytes(ranks: int, size_bytes: int) -> int:
    """Return the fewest bytes that each rank sends to add up a tensor: 2 (N-1)/N of it (Patarasuk and Yuan, 2009)."""
    return 2 * (ranks - 1) * size_bytes // ranks


def measure_link(world: World) -> Link:
    """Measure with all ranks of a world of at least two.

    Raises: MachineError.
    """
    small, large = torch.zeros(1), torch.zeros(_LARGE_BYTES // 4)
    latency_s = _median_s(world, small, _SMALL_SUMS)
    spent_s = max(_median_s(world, large, _LARGE_SUMS) - latency_s, 1e-9)
    return Link(sent_bytes(world.size, _LARGE_BYTES) / spent_s, latency_s)


def _median_s(world: World, tensor: torch.Tensor, times: int) -> float:
    """Return the median time of a sum, the first left out."""
    found = []
    for _ in range(times + 1):
        started = time.perf_counter()
        world.all_reduce(tensor)
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def measure_loopback() -> Link:
    """Measure between two processes of this machine, one thread each; takes some seconds.

    Raises: MachineError when they cannot meet.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", __name__], env=os.environ | place | {"RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    answers = [process.communicate() for process in started]
    for process, (_, errors) in zip(started, answers, strict=True):
        if process.returncode != 0:
            reason = (errors.strip().splitlines() or ["without a word"])[-1]
            raise MachineError(f"two processes of this machine cannot add up tensors ({reason}); give --link-rate")
    return Link(**json.loads(answers[0][0]))


def _main() -> None:
    with joined(_TIMEOUT_S) as world:
        found = measure_link(world)
        if world.is_writer:
            sys.stdout.write(json.dumps(asdict(found)))


if __name__ == "__main__":
    _main()
