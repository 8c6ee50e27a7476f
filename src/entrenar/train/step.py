"""One global batch's gradient, however much of it fits into memory at a time.

The loss of a batch is a sum over its targets, so the gradient of a global batch is the plain sum over its pieces,
and the division by the number of targets happens once, in the optimizer. When memory runs out in forward or
backward, the step is undone (gradients forgotten, random state put back), the pieces are halved, and the step is
done again: same global batch, same weights of its targets, same gradient. The optimizer's step is never retried.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entrenar.errors import OutOfMemoryError
from entrenar.train import rng
from entrenar.train.oom import is_oom, return_freed_memory
from entrenar.train.precision import GradientSums
from entrenar.train.settings import Batch


@dataclass
class RowLimit:
    """The most rows of a batch that go through the model at once; None as long as whole micro-batches fit."""

    rows: int | None = None

    def cut(self, batches: Sequence[Batch]) -> list[Any]:
        """Return the batches in pieces of at most `rows` rows."""
        if self.rows is None:
            return list(batches)
        return [piece for batch in batches for piece in batch.split(self.rows)]

    def halve(self, batches: Sequence[Batch], reason: str) -> None:
        """Take half as many rows at once.

        Raises: OutOfMemoryError when one row was too much already.
        """
        rows = self.rows or max(len(batch.split(1)) for batch in batches)
        if rows <= 1:
            raise OutOfMemoryError(
                f"memory ran out with a single row ({reason}); shorten seq_len, set checkpointing = full or "
                "precision = bfloat16, or choose a smaller model"
            )
        self.rows = rows // 2


def sum_gradients(
    batches: Sequence[Batch],
    loss: Callable[[Any], Tensor],
    gradients: GradientSums,
    limit: RowLimit,
    phase: Callable[[str], Any],
    on_split: Callable[[str], None],
) -> Tensor:
    """Leave the gradient of the summed loss of `batches` in `gradients` and return that loss in float64.

    Raises: OutOfMemoryError.
    """
    before = rng.capture()
    while True:
        try:
            return _forward_backward(limit.cut(batches), loss, gradients, phase)
        except (RuntimeError, MemoryError) as error:
            if not is_oom(error):
                raise
            reason = str(error).partition("\n")[0]
        # Outside the handler, so that the traceback and the activations its frames hold are gone.
        gradients.begin(0)
        return_freed_memory()
        rng.restore(before)
        limit.halve(batches, reason)
        on_split(f"memory ran out ({reason}); the step is done again with {limit.rows} rows at a time")


def _forward_backward(
    pieces: Sequence[Any], loss: Callable[[Any], Tensor], gradients: GradientSums, phase: Callable[[str], Any]
) -> Tensor:
    gradients.begin(len(pieces))
    losses = []
    for piece in pieces:
        with phase("forward"):
            piece_loss = loss(piece)
        with phase("backward"):
            piece_loss.backward()  # type: ignore[no-untyped-call]
        losses.append(piece_loss.detach().double())
    return torch.stack(losses).sum()
