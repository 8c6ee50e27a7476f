"""The loss of a batch, wherever the batch lies: shared by training, evaluation and the plan of a run."""

from collections.abc import Callable
from typing import Protocol, Self, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from entrenar.model.llama import Llama
from entrenar.ops import DocumentSpans


@runtime_checkable
class TokenBatch(Protocol):
    """Rows of tokens with their targets; `entrenar.data.Batch` is one."""

    @property
    def input_ids(self) -> Tensor:
        """Tokens, (B, T)."""
        ...

    @property
    def targets(self) -> Tensor:
        """The token after each token, -100 where none is asked for, (B, T)."""
        ...

    @property
    def documents(self) -> DocumentSpans | None:
        """The half-open spans of the documents in each row of a packed batch."""
        ...

    def to(self, device: torch.device, /) -> Self:
        """Return the batch on a device."""
        ...


BatchLoss = Callable[[TokenBatch], Float[Tensor, ""]]


def batch_loss(model: Llama, device: torch.device, *, is_compiled: bool = False) -> BatchLoss:
    """Return the function that moves a batch to `device` and gives its loss, summed over the targets in float32."""
    loss_of: Callable[..., Tensor] = torch.compile(model.loss) if is_compiled else model.loss

    def loss(batch: TokenBatch) -> Tensor:
        # Targets stay on the host: there it is known which are asked for, without waiting for the device.
        return loss_of(batch.input_ids.to(device, non_blocking=True), batch.targets, documents=batch.documents)

    return loss
