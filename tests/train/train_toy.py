"""A small model with dropout, a loader whose position is its state, and what a run needs of them."""

import hashlib
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from entrenar.runs import list_checkpoints, read_records
from entrenar.train import (
    CheckpointConfig,
    MonitorConfig,
    OptimConfig,
    Run,
    ScheduleConfig,
    Settings,
    Task,
    TrainConfig,
    fit,
    latest_good,
    seed_all,
)

ROWS, WIDTH, CLASSES = 4, 6, 5
BATCHES_PER_EPOCH = 7


class Toy(nn.Module):
    """Two layers with a norm and dropout between; draws from the global generator at every forward."""

    def __init__(self, *, dropout: float = 0.1, width: int = 16, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up = nn.Linear(WIDTH, width, bias=False, dtype=dtype)
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.down = nn.Linear(width, CLASSES, bias=False, dtype=dtype)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(self.norm(self.up(x.to(self.up.weight.dtype)).relu())))


@dataclass(frozen=True)
class ToyBatch:
    """Rows of features with one target each; -100 is no target."""

    x: Tensor
    y: Tensor

    @property
    def num_targets(self) -> int:
        return int((self.y != -100).sum())

    def split(self, rows: int) -> list["ToyBatch"]:
        return [ToyBatch(x, y) for x, y in zip(self.x.split(rows), self.y.split(rows), strict=True)]


@dataclass(frozen=True)
class Position:
    """The number of batches read."""

    index: int

    def to_dict(self) -> dict[str, int]:
        return {"index": self.index}


def toy_batches(
    start: dict[str, Any] | None = None, *, end: int | None = None, rows: int = ROWS
) -> Iterator[tuple[ToyBatch, Position]]:
    """Yield batches that depend on their index only; every epoch repeats the first."""
    index = start["index"] if start else 0
    while end is None or index < end:
        generator = torch.Generator().manual_seed(index % BATCHES_PER_EPOCH)
        x = torch.randn(rows, WIDTH, generator=generator)
        y = torch.randint(0, CLASSES, (rows,), generator=generator)
        y[: index % 3] = -100
        index += 1
        yield ToyBatch(x, y), Position(index)


def toy_loss(module: nn.Module) -> Callable[[ToyBatch], Tensor]:
    """Return the summed cross-entropy of `module`."""

    def loss(batch: ToyBatch) -> Tensor:
        logits = module(batch.x)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return nn.functional.cross_entropy(wide, batch.y, ignore_index=-100, reduction="sum")

    return loss


def write_model(folder: Path, weights: Mapping[str, Tensor]) -> None:
    save_file(dict(weights), folder / "model.safetensors")


def read_model(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def toy_task(module: nn.Module, start: dict[str, Any] | None = None, **changes: Any) -> Task[ToyBatch]:
    """Return the task of training `module` on the toy batches from `start` on."""
    end = changes.pop("end", None)
    fields: dict[str, Any] = {
        "module": module,
        "batches": toy_batches(start, end=end),
        "loss": toy_loss(module),
        "write_model": write_model,
        "read_model": read_model,
        "micro_batches_per_epoch": BATCHES_PER_EPOCH,
    }
    return Task(**(fields | changes))


def held_out(module: nn.Module) -> Callable[[], dict[str, float]]:
    """Return an evaluation of `module` on one fixed batch."""
    batch = next(toy_batches({"index": 1000}))[0]
    return lambda: {"loss": toy_loss(module)(batch).item() / batch.num_targets}


def toy_settings(**changes: Any) -> Settings:
    """Return settings of a short run; `changes` are fields of any of the config models."""
    fields: dict[str, Any] = {
        "max_steps": 12,
        "eval_every": 4,
        "lr": 1e-2,
        "save_every": 5,
        "warmup_steps": 2,
    } | changes
    owners = {
        "train": TrainConfig,
        "optim": OptimConfig,
        "schedule": ScheduleConfig,
        "checkpoint": CheckpointConfig,
        "monitor": MonitorConfig,
    }
    unknown = fields.keys() - {name for owner in owners.values() for name in owner.model_fields}
    assert not unknown, unknown
    return Settings(
        **{
            part: owner(**{k: v for k, v in fields.items() if k in owner.model_fields})
            for part, owner in owners.items()
        }
    )


def run_toy(
    folder: Path, *, resume: bool = False, before_loss: Callable[[int], None] | None = None, **changes: Any
) -> Toy:
    """Train the toy in `folder`, from its latest checkpoint if there is one and `resume`; return the module.

    `before_loss` is called with the number of losses computed so far in this process.
    """
    seed_all(5)
    module = Toy()
    resumed = latest_good(folder / "checkpoints") if resume and list_checkpoints(folder / "checkpoints") else None
    loss, count = toy_loss(module), 0

    def counted(batch: ToyBatch) -> Tensor:
        nonlocal count
        if before_loss is not None:
            before_loss(count)
        count += 1
        return loss(batch)

    task = toy_task(module, resumed.loader_state if resumed else None, loss=counted, evaluate=held_out(module))
    fit(task, toy_settings(**changes), Run(folder, {"lr": 1e-2}, resumed))
    return module


@contextmanager
def signals_by_default() -> Iterator[None]:
    """Under nohup or in the background of a script, a process begins with signals ignored."""
    numbers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in numbers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def in_child(action: Callable[[], object]) -> int:
    """Run `action` in a forked child; return 0, its exit code, or minus the signal that ended it."""
    with warnings.catch_warnings():
        # Python 3.12 warns of threads that do not survive a fork; the checkpoint threads of earlier tests ended.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:  # noqa: BLE001  # the child must not return into pytest
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fingerprint(folder: Path) -> dict[str, Any]:
    """Return every byte of the latest checkpoint that a resumed run must share with one that was never stopped.

    Only what is measured with a clock is left out.
    """
    last = latest_good(folder / "checkpoints")
    tensors = {f"model.{name}": tensor for name, tensor in read_model(last.model).items()} | last.optimizer()
    state = {key: last.state[key] for key in ("loader", "rng", "rows", "held_out")}
    counters = {key: value for key, value in last.state["counters"].items() if key != "elapsed_s"}
    windows = {key: value for key, value in last.state["monitor"]["windows"].items() if key != "rate"}
    hashes = {
        name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in ((n, t.reshape(-1)) for n, t in tensors.items())
    }
    return {"step": last.step, "tensors": hashes, "counters": counters, "windows": windows, **state}


def losses(folder: Path) -> list[tuple[int, float]]:
    """Return step and loss of every record of the run."""
    return [(record["step"], record["loss"]) for record in read_records(folder / "metrics.jsonl")]
