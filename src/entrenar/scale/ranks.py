"""Join the ranks that torchrun started, and report a rank that is gone as an error with a remedy.

torchrun gives each process its number and the address where they meet as environment variables, and ends all processes
once one has failed. The sums run over gloo, on the CPU.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from entrenar.errors import MachineError
from entrenar.scale.watch import RANKS_FOLDER, Watch
from entrenar.train import World

_RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


_watches: list[Watch] = []  # of the run under way, if it has one


def current_world() -> World:
    """Return the world of the process group that this process has joined; a world of one process without a group."""
    if not (dist.is_available() and dist.is_initialized()):
        return World.alone()
    return World(dist.get_rank(), dist.get_world_size(), _add_up)


def _add_up(tensor: Tensor) -> None:
    dense = tensor.contiguous()
    note()
    with in_contact():
        dist.all_reduce(dense)
    for watch in _watches:
        watch.expect()
    if dense is not tensor:
        tensor.copy_(dense)


@contextmanager
def in_contact() -> Iterator[None]:
    """Say what it means if an exchange in the block fails.

    Raises: MachineError.
    """
    try:
        yield
    except RuntimeError as error:
        raise _lost_contact(error) from error


def note() -> None:
    """Count a place in the run that every rank comes to, so that those who did not can be named."""
    for watch in _watches:
        watch.note()


def _lost_contact(error: RuntimeError) -> MachineError:
    reason = str(error).strip().partition("\n")[0]
    late = sorted({rank for watch in _watches for rank in watch.late()})
    who = f": {_ranks(late)} did not come" if late else ""
    return MachineError(
        f"rank {dist.get_rank()} lost contact with another rank{who} ({reason}); the message of the rank that "
        f"ended first names the cause, see also RUN/{RANKS_FOLDER}; continue with --resume"
    )


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


@contextmanager
def watched(run_dir: Path, timeout_s: float) -> Iterator[None]:
    """Let the ranks know of each other, inside the block, who is late and where it stands.

    Raises: MachineError, also for a connection that is lost inside the block.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    watch = Watch(run_dir, dist.get_rank(), timeout_s)
    _watches.append(watch)
    try:
        yield
    except RuntimeError as error:  # of a sum or an exchange that torch began by itself
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise _lost_contact(error) from error
        raise
    finally:
        _watches.remove(watch)
        watch.close()


@contextmanager
def joined(timeout_s: float) -> Iterator[World]:
    """Join the ranks if torchrun started this process as one of several, and leave them at the end.

    A rank waits for the others for `timeout_s` at most.

    Raises: MachineError when the ranks cannot meet.
    """
    if any(name not in os.environ for name in _RENDEZVOUS) or os.environ["WORLD_SIZE"] == "1" or dist.is_initialized():
        yield current_world()
        return
    try:
        _meet(timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).strip().partition("\n")[0]
        raise MachineError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} cannot meet the others at {place} ({reason}); "
            "choose a free port (torchrun --master-port), and check that every host reaches that address"
        ) from error
    try:
        yield current_world()
    finally:
        dist.destroy_process_group()


def _meet(timeout: timedelta) -> None:
    """Join the group; ranks that torchrun has started again do not read the addresses of those that died.

    torchrun keeps the same store for all starts (seen with torch 2.13 and --standalone), so each start has keys of its
    own.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    own = PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group("gloo", store=own, rank=rank, world_size=size, timeout=timeout)


def rank_log(run_dir: Path, rank: int) -> logging.FileHandler:
    """Open the log of a rank in the run's folder, to be written at its end.

    Raises: MachineError.
    """
    path = run_dir / RANKS_FOLDER / f"rank-{rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise MachineError(f"cannot write the log {path}: {error.strerror}; free the path or choose another") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    return handler
