"""Is the state of a run fit to go on from? Asked before it is saved, and once more when a training alarm stops the run.

A diverged run must not save its ruin in the place of a good checkpoint. Two signs give a ruin away: numbers that are
not finite, and, where all are finite, a loss that has grown on the very batch that was trained on. One step lowers
the loss of its own batch, or leaves it about where it was; a step that more than doubles it has wrecked the weights.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from entrenar.train.pieces import own_part
from entrenar.train.task import SplittableBatch

# A loss near zero may double by chance; the margin is in nats a target.
_GROWTH, _MARGIN_NATS = 2.0, 1.0


@dataclass(frozen=True)
class TrainedOn:
    """The batches of the last step that moved the weights, and their mean loss before it moved them."""

    batches: Sequence[SplittableBatch]
    loss: float


def fault_of_numbers(tensors: Mapping[str, Tensor]) -> str | None:
    """Say which tensors hold NaN or infinity; None if all are finite."""
    parts = {name: own_part(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}
    names = [name for name, part in parts.items() if part.numel()]
    finite = _are_finite(parts[name] for name in names)
    bad = [name for name, is_good in zip(names, finite, strict=True) if not is_good]
    return f"{len(bad)} of {len(tensors)} tensors are not finite, {bad[0]} among them" if bad else None


def _are_finite(tensors: Iterable[Tensor]) -> list[bool]:
    """Return whether each tensor is finite, in one pass without a copy; a device is asked once."""
    ranges = [torch.stack(torch.aminmax(tensor)).isfinite().all() for tensor in tensors]
    return torch.stack(ranges).tolist() if ranges else []


def fault_of_loss(
    module: nn.Module, loss: Callable[[Any], Tensor], trained_on: TrainedOn, rows: int | None
) -> str | None:
    """Say how the loss has grown on the batches that were trained on; None if it has not, or cannot be known.

    `rows` is the most rows that fit into memory at once.
    """
    targets = sum(batch.num_targets for batch in trained_on.batches)
    if not targets:
        return None
    pieces = [piece for batch in trained_on.batches for piece in ([batch] if rows is None else batch.split(rows))]
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            now = math.fsum(loss(piece).item() for piece in pieces) / targets
    except (RuntimeError, MemoryError):
        return None  # memory is short: the weights are finite, and that is all that is known
    finally:
        module.train(was_training)
    if math.isfinite(now) and now <= _GROWTH * trained_on.loss + _MARGIN_NATS:
        return None
    return f"the loss of the batch that was just trained on went from {trained_on.loss:.4g} to {now:.4g}"
