"""Identify what a rank holds, so that ranks can be compared without sending a weight."""

import hashlib

import torch
from torch import nn


def weight_hashes(module: nn.Module, *, only_frozen: bool = False) -> dict[str, str]:
    """Return the SHA-256 of each parameter and buffer by name, or of those alone that are not trained."""
    hashes = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if only_frozen and tensor.requires_grad:
            continue
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        hashes[name] = hashlib.sha256(content.data).hexdigest()
    return hashes
