"""Measure how well a model predicts text that it was not trained on.

Losses are summed over targets and divided once, so the result for a text does not depend on how it is cut into
batches. Bits per byte compare models with different tokenizers: the same text costs a sum of bits, and it has a
number of bytes.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from entrenar.errors import DataError
from entrenar.model import Llama, TokenBatch


@runtime_checkable
class EvalBatch(TokenBatch, Protocol):
    """A batch that may know how many bytes its targets stand for; `entrenar.data.Batch` is one."""

    @property
    def num_bytes(self) -> int | None:
        """Bytes of UTF-8 that the targets stand for."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """The fit of a model to a text.

    Attributes:
        loss: mean cross entropy of a target, in nats.
        perplexity: exp(loss).
        bits_per_byte: the text's cost in bits for each of its bytes; None if a batch does not know its bytes.
        num_targets: targets predicted.
        num_bytes: the bytes of text in these targets.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    num_targets: int
    num_bytes: int | None


@torch.no_grad()
def evaluate(model: Llama, batches: Iterable[EvalBatch]) -> Evaluation:
    """Predict every target of every batch, on the model's device.

    Raises:
        DataError: there is no target.
    """
    device = model.device
    losses: list[Tensor] = []
    num_targets, num_bytes = 0, 0
    has_bytes = True
    for batch in batches:
        input_ids = batch.input_ids.to(device, non_blocking=True)
        losses.append(model.loss(input_ids, batch.targets, documents=batch.documents))
        num_targets += int((batch.targets != -100).sum())
        has_bytes = has_bytes and batch.num_bytes is not None
        num_bytes += batch.num_bytes or 0
    if num_targets == 0:
        raise DataError(
            f"evaluation needs at least one target, got none in {len(losses)} batches; "
            "the held-out text is empty or entirely masked"
        )
    total = math.fsum(torch.stack(losses).tolist())  # the one wait for the device
    loss = total / num_targets
    return Evaluation(
        loss=loss,
        perplexity=_exp(loss),
        bits_per_byte=total / math.log(2) / num_bytes if has_bytes and num_bytes else None,
        num_targets=num_targets,
        num_bytes=num_bytes if has_bytes else None,
    )


def _exp(loss: float) -> float:
    """Return e^loss, infinite where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
