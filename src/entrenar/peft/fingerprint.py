"""One number for a set of weights: equal weights, equal number, whatever file or process they came from."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def fingerprint(tensors: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """Return the hex SHA-256 over names, dtypes, shapes and bytes, in the order of the names.

    With `dtype`, the same weights are hashed after rounding to it, one at a time; codes and scales do not change.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        cast = dtype if name.endswith(".weight") else None
        tensor = tensors[name].detach().to("cpu", cast).contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
