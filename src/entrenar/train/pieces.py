"""Weights in pieces: each rank holds, trains and saves its rows of every tensor, and not the others'.

A tensor in pieces is a `DTensor` of torch, cut along its first dimension as FSDP2 does. It has the shape of the whole
and is made of what lies here: arithmetic on single numbers works on that part, and only what needs all rows at once,
such as a norm or a checkpoint, asks the other ranks.
"""

from typing import Any

import torch
from torch import Tensor, nn


def is_in_pieces(tensor: Tensor) -> bool:
    """Return whether a tensor is a piece here and others elsewhere."""
    return hasattr(tensor, "to_local")


def has_pieces(module: nn.Module) -> bool:
    """Return whether a weight of a module is in pieces."""
    return any(is_in_pieces(parameter) for parameter in module.parameters())


@torch.no_grad()
def own_part(tensor: Tensor) -> Tensor:
    """Return what of a tensor lies on this rank, in the same memory: its rows, or all of one that is not in pieces."""
    piece: Any = tensor
    part: Tensor = piece.to_local() if is_in_pieces(tensor) else tensor
    return part


def rows_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return the rows of `whole` that this rank holds of `like`, which has the same shape."""
    if not is_in_pieces(like):
        return whole
    piece: Any = like
    (dim,) = [number for number, placement in enumerate(piece.placements) if placement.is_shard()]
    number, count = piece.device_mesh.get_local_rank(dim), piece.device_mesh.size(dim)
    parts = whole.chunk(count)
    return parts[number] if number < len(parts) else whole[:0]


@torch.no_grad()
def fill(tensor: Tensor, whole: Tensor) -> None:
    """Copy this rank's rows of `whole` into a tensor, byte for byte."""
    own_part(tensor).copy_(rows_of(whole, tensor))
