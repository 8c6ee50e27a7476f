"""Read the loss and the gradient norms of a step, where gradients are whole and where each rank has a piece of them."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from entrenar.train.optim import Optimizer
from entrenar.train.world import Pieces

_SQUARE = "square of "


def own_squares(optimizer: Optimizer, pieces: Pieces | None) -> dict[str, float]:
    """Return what this rank adds to the squared gradient norm of each layer; nothing where gradients are whole."""
    if pieces is None:
        return {}
    _, parts = optimizer.gradient_norms()
    norms = optimizer.layer_norms(parts.tolist())
    return {f"{_SQUARE}{layer}": norm * norm / pieces.copies for layer, norm in norms.items()}


def loss_and_norms(
    optimizer: Optimizer, summed_loss: Tensor, totals: Mapping[str, float]
) -> tuple[float, float, dict[str, float]]:
    """Return the summed loss, the gradient norm, and the norms of the layers, all unscaled.

    `totals` are the sums over all ranks, `own_squares` among them.
    """
    squares = {key.removeprefix(_SQUARE): total for key, total in totals.items() if key.startswith(_SQUARE)}
    if squares:
        layers = {layer: math.sqrt(square) for layer, square in squares.items()}
        return summed_loss.item(), math.sqrt(math.fsum(squares.values())), layers
    norm, parts = optimizer.gradient_norms()
    # The one moment of a step in which the host waits for a device.
    both = torch.stack([summed_loss.to(norm.device), norm.double()])
    loss, grad_norm, *of_parts = torch.cat([both, parts.double()]).tolist()
    return loss, grad_norm, optimizer.layer_norms(of_parts)
