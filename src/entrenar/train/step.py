"""Compute the gradient of one global batch in pieces that fit into memory.

The loss of a batch is a sum over its targets, so the gradient of a global batch is the plain sum over its pieces, of
all micro-batches and all ranks, and the division by the number of targets happens once, in the optimizer. When memory
runs out in forward or backward on any rank, every rank undoes the step (gradients forgotten, random state put back),
halves its pieces, and repeats the step: same global batch, same weight of each target, same gradient. The optimizer's
step is never repeated.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from entrenar.errors import OutOfMemoryError
from entrenar.train import rng
from entrenar.train.oom import is_oom, return_freed_memory
from entrenar.train.precision import GradientSums
from entrenar.train.task import SplittableBatch
from entrenar.train.world import World

PhaseOf = Callable[[str], AbstractContextManager[Any]]


@dataclass
class RowLimit:
    """The most rows of a batch that go through the model at once; None as long as whole micro-batches fit."""

    rows: int | None = None

    def cut(self, batches: Sequence[SplittableBatch]) -> list[Any]:
        """Return the batches in pieces of at most `rows` rows."""
        if self.rows is None:
            return list(batches)
        return [piece for batch in batches for piece in batch.split(self.rows)]

    def halve(self, largest_batch: int, reason: str) -> None:
        """Take half as many rows at once.

        Raises: OutOfMemoryError when one row was too much already.
        """
        rows = self.rows or largest_batch
        if rows <= 1:
            raise OutOfMemoryError(
                f"memory ran out with a single row ({reason}); shorten seq_len, set checkpointing = full or "
                "precision = bfloat16, or choose a smaller model"
            )
        self.rows = rows // 2


@dataclass(frozen=True)
class StepGradient:
    """Takes the gradient of one global batch after the other.

    Attributes:
        gradients: where the gradient is left.
        limit: the pieces that fit into memory; it shrinks when they do not.
        phase: opens a block that is timed as "forward" or "backward".
        on_split: is told when memory ran out and the step is repeated in smaller pieces.
    """

    loss: Callable[[Any], Tensor]
    gradients: GradientSums
    limit: RowLimit
    world: World
    phase: PhaseOf
    on_split: Callable[[str], None]

    def take(
        self, batches: Sequence[SplittableBatch], report: Callable[[], Mapping[str, float]] = dict
    ) -> tuple[Tensor, dict[str, float]]:
        """Leave the gradient of the summed loss of `batches` of all ranks in `gradients`.

        Returns: that loss in float64, which a device may still be computing; and, summed over all ranks by the same
        reduction, `targets`, `micro_batches`, and whatever `report` adds, which is called just before.

        Raises: OutOfMemoryError.
        """
        before = rng.capture()
        while True:
            loss, failure = self._attempt(batches)
            totals = self.world.sum(
                out_of_memory=float(failure is not None),
                loss=loss.item() if self.world.size > 1 else 0.0,
                targets=sum(batch.num_targets for batch in batches),
                micro_batches=len(batches),
                **report(),
            )
            if not totals["out_of_memory"]:
                if self.world.pieces is None:  # pieces are summed as the backward goes
                    self.world.add_up(self.gradients.all())
                total = totals.pop("loss")
                return torch.tensor(total, dtype=torch.float64) if self.world.size > 1 else loss, totals
            self._undo(before)
            rows = max((len(batch.split(1)) for batch in batches), default=0)
            reason = failure or "on another rank"
            self.limit.halve(self.world.largest(rows), reason)
            self.on_split(f"memory ran out ({reason}); the step is repeated with {self.limit.rows} rows at a time")

    def _attempt(self, batches: Sequence[SplittableBatch]) -> tuple[Tensor, str | None]:
        """Return the summed loss, or the reason why memory ran out."""
        has_pieces = self.world.pieces is not None
        passes = list(batches) if has_pieces else self.limit.cut(batches)
        try:
            self.gradients.begin(len(passes) * self.world.size)
            return forward_backward(passes, self.loss, self.phase), None
        except (RuntimeError, MemoryError) as error:
            if not is_oom(error):
                raise
            reason = str(error).partition("\n")[0]
            if has_pieces:  # the others are in the middle of a sum that this rank will not come to
                raise OutOfMemoryError(
                    f"memory ran out in the middle of a step ({reason}), and ranks that hold pieces of the weights "
                    "cannot repeat one; set a smaller batch_size with more grad_accum_steps, or checkpointing = full"
                ) from error
            return torch.zeros((), dtype=torch.float64), reason

    def _undo(self, before: dict[str, Any]) -> None:
        # Outside the handler, so that the traceback and the activations its frames hold are gone.
        self.gradients.begin(0)
        return_freed_memory()
        rng.restore(before)


def forward_backward(
    pieces: Sequence[Any], loss: Callable[[Any], Tensor], phase: PhaseOf = lambda _: nullcontext()
) -> Tensor:
    """Add up the gradients of the losses of `pieces` and return the summed loss in float64."""
    losses = []
    for piece in pieces:
        with phase("forward"):
            piece_loss = loss(piece)
        with phase("backward"):
            piece_loss.backward()  # type: ignore[no-untyped-call]
        losses.append(piece_loss.detach().double())
    return torch.stack(losses).sum() if losses else torch.zeros((), dtype=torch.float64)
