"""Put a model together from tensors that a reader hands over one at a time."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from entrenar.errors import FormatError
from entrenar.interop.safetensors_file import is_finite
from entrenar.model import Llama, LlamaConfig


def assemble(path: Path, config: LlamaConfig, tensors: Iterable[tuple[str, Tensor]]) -> Llama:
    """Build a model without storage and give it its tensors.

    Raises:
        FormatError: a tensor has NaN or infinite numbers, another shape, no place, or is missing.
    """
    with torch.device("meta"):
        model = Llama(config)
    model.eval()
    wanted = dict(model.named_parameters())
    for name, tensor in tensors:
        if name not in wanted:
            raise FormatError(f"{path} holds tensor {name}, which the architecture in its header does not have")
        if tensor.shape != wanted[name].shape:
            raise FormatError(
                f"{path}: tensor {name} has shape {tuple(tensor.shape)}, "
                f"its header asks for {tuple(wanted[name].shape)}"
            )
        if not is_finite(tensor):
            raise FormatError(f"{path}: tensor {name} holds NaN or infinite weights")
        set_parameter(model, name, tensor)
        del wanted[name]
    if wanted:
        raise FormatError(f"{path} lacks {len(wanted)} tensors of the model, {min(wanted)} first")
    return model


def give_storage(model: Llama, device: torch.device) -> None:
    """Give a model without storage float32 weights whose values are not set yet.

    `to_empty` would do it, and load torch's symbolic algebra for it: 2 s and 14 MB at the start of each run.
    """
    for name, parameter in list(model.named_parameters()):
        set_parameter(model, name, torch.empty(parameter.shape, device=device))


def set_parameter(model: Llama, name: str, tensor: Tensor) -> None:
    """Replace a parameter by its name."""
    owner_name, _, own_name = name.rpartition(".")
    setattr(model.get_submodule(owner_name), own_name, torch.nn.Parameter(tensor))
