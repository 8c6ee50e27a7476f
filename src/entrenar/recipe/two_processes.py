"""The gradient of a batch by two real processes that meet over gloo, as those of `torchrun --nproc-per-node 2` do.

`TwoProcesses` starts them once, as this module run by Python, and hands them models and shares as folders. Each takes
the gradient of its own share, and the sum over both is written by the first.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from entrenar.data import Batch
from entrenar.errors import MachineError
from entrenar.interop import load_model, save_model
from entrenar.model import Llama
from entrenar.scale import joined

SIZE = 2
_TIMEOUT_S = 600.0
_DONE = "done"

Gradients = dict[str, Tensor]


class TwoProcesses:
    """Two processes that take gradients together, until the block ends."""

    def __enter__(self) -> "TwoProcesses":
        """Start them; they load torch meanwhile."""
        self._folder = TemporaryDirectory()
        self._errors = (Path(self._folder.name) / "errors").open("w+", encoding="utf-8")
        self._jobs = 0
        threads = str(max(1, torch.get_num_threads() // SIZE))
        place = {"WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        self._ranks = [
            subprocess.Popen(
                [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                env=os.environ | place | {"RANK": str(rank), "OMP_NUM_THREADS": threads}, text=True,
            )
            for rank in range(SIZE)
        ]  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        """End them."""
        for rank in self._ranks:
            rank.kill()
            rank.communicate()
        self._errors.close()
        self._folder.cleanup()

    def gradients(self, model: Llama, shares: Sequence[Batch]) -> Gradients:
        """Return the gradient of the loss summed over `shares`, one for each process.

        Raises: MachineError when a process fails.
        """
        self._jobs += 1
        folder = Path(self._folder.name) / str(self._jobs)
        folder.mkdir()
        save_model(folder, model.config, dict(model.named_parameters()))
        job = {"compute_dtype": None if model.compute_dtype is None else str(model.compute_dtype).partition(".")[2]}
        for rank, share in enumerate(shares):
            save_file({"ids": share.input_ids.cpu(), "targets": share.targets.cpu()}, folder / f"share-{rank}")
        (folder / "job.json").write_text(json.dumps({**job, "documents": [share.documents for share in shares]}))
        for process in self._ranks:
            _say(cast(IO[str], process.stdin), str(folder))
        for rank, process in enumerate(self._ranks):
            if cast(IO[str], process.stdout).readline().strip() != _DONE:
                raise MachineError(f"process {rank} of {SIZE} failed: {self._last_error()}; see that gloo works here")
        device = model.model.norm.weight.device
        return {name: gradient.to(device) for name, gradient in load_file(folder / "gradients").items()}

    def _last_error(self) -> str:
        self._errors.seek(0)
        return (self._errors.read().strip().splitlines() or ["it ended without a word"])[-1]


def _say(pipe: IO[str], line: str) -> None:
    try:
        pipe.write(line + "\n")
        pipe.flush()
    except BrokenPipeError:
        return  # its answer, which does not come, tells


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _serve() -> None:
    """Answer each folder on the standard input with the sum of both processes' gradients, in the folder."""
    with joined(_TIMEOUT_S) as world:
        for line in sys.stdin:
            folder = Path(line.strip())
            found = _own_gradients(folder, world.rank)
            world.add_up(found.values())
            if world.is_writer:
                save_file(found, folder / "gradients")
            sys.stdout.write(_DONE + "\n")
            sys.stdout.flush()


def _own_gradients(folder: Path, rank: int) -> Gradients:
    job, share = json.loads((folder / "job.json").read_text()), load_file(folder / f"share-{rank}")
    documents = job["documents"][rank]
    model = load_model(folder)
    model.train()
    model.set_compute_dtype(None if job["compute_dtype"] is None else getattr(torch, job["compute_dtype"]))
    spans = None if documents is None else tuple(tuple((start, end) for start, end in row) for row in documents)
    model.loss(share["ids"], share["targets"], documents=spans).backward()  # type: ignore[no-untyped-call]
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


if __name__ == "__main__":
    _serve()
