"""A small model with dropout, a loader whose position is its state, and what a run needs of them."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from entrenar.train import Task

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
