"""Adapters over a frozen model: put them in, switch them, merge them, take them out.

`from_base` and `merge` are inverse ends of one road: the first replaces projections by `LoraLinear`s over the same
weights, the second puts what they do into the weights, `unmerge` takes it out again, `unload` gives the plain modules
back. The base's weights are never written to; merging swaps a new tensor in and keeps the old one until `unload`.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from entrenar.errors import ConfigError
from entrenar.peft.config import LoraConfig
from entrenar.peft.layers import LoraLinear, LowRank, SavedModule
from entrenar.peft.targets import find_saved, find_targets

DEFAULT_ADAPTER = "default"

# Gives the plain weight that a quantized projection came from, by the projection's name.
OriginalWeight = Callable[[str], Tensor]

_ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]+")
_WRAPPED_NAME = re.compile(r"\.base_layer(?=\.|$)")


def from_base(
    model: nn.Module,
    config: LoraConfig,
    generator: torch.Generator,
    name: str = DEFAULT_ADAPTER,
    original: OriginalWeight | None = None,
) -> None:
    """Freeze the model, give it a new adapter, and train that; `original` is what loftq begins with.

    Raises:
        ConfigError: a word of the config means nothing in this model, or the name is taken.
    """
    add_adapter(model, config, generator, name, original)
    model.requires_grad_(requires_grad=False)
    set_adapter(model, name, is_trainable=True)


def add_adapter(
    model: nn.Module,
    config: LoraConfig,
    generator: torch.Generator,
    name: str,
    original: OriginalWeight | None = None,
) -> None:
    """Hold a new adapter, neither in use nor trained. Nothing is changed when it fails.

    Raises:
        ConfigError: a word of the config means nothing in this model, or the name is taken or no name.
    """
    if not _ADAPTER_NAME.fullmatch(name) or hasattr(nn.ModuleDict(), name):
        raise ConfigError(f"an adapter's name is made of letters, digits, - and _, got {name!r}")
    if name in adapter_names(model):
        raise ConfigError(f"adapter {name!r} is there already; held are {', '.join(adapter_names(model))}")
    _check_not_merged(model)
    targets, saved = find_targets(model, config), find_saved(model, config)
    copies = {
        path: module if isinstance(module, SavedModule) else SavedModule(module) for path, module in saved.items()
    }
    for path, module in targets.items():
        wrapper = module if isinstance(module, LoraLinear) else LoraLinear(module)
        adapter = LowRank(wrapper.weight, config.rank_of(path), config.scale_of(path), config.lora_dropout)
        adapter.draw(wrapper.weight, config.lora_init, generator, original and functools.partial(original, path))
        if config.use_dora:
            adapter.add_magnitude(wrapper.weight)
        wrapper.adapters[name] = adapter.requires_grad_(requires_grad=False)
        _replace(model, path, wrapper)
    for path, copy in copies.items():
        base_weight = cast(Tensor, copy.base_layer.weight)
        copy.adapters[name] = nn.Parameter(base_weight.detach().clone(), requires_grad=False)
        _replace(model, path, copy)


def set_adapter(model: nn.Module, name: str | None, *, is_trainable: bool = False) -> None:
    """Use another adapter, None for the base alone; only the one in use can be trained.

    Raises:
        ConfigError: no adapter of that name is held, or the model is merged.
    """
    if name is not None and name not in adapter_names(model):
        raise ConfigError(f"no adapter {name!r} is held; there are {', '.join(adapter_names(model)) or 'none'}")
    _check_not_merged(model)
    for _, module in wrappers(model):
        module.active = name if name is not None and name in module.adapters else None
        for held in module.adapters:
            module.adapters[held].requires_grad_(is_trainable and held == module.active)


def wrappers(model: nn.Module) -> Iterator[tuple[str, LoraLinear | SavedModule]]:
    """Yield name and module of everything that holds adapters."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear | SavedModule):
            yield name, module


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the adapters that are held, in order of the alphabet."""
    return sorted({name for _, module in wrappers(model) for name in module.adapters})


def active_adapter(model: nn.Module) -> str | None:
    """Return the name of the adapter in use."""
    return next((module.active for _, module in wrappers(model) if module.active is not None), None)


def merge(model: nn.Module) -> None:
    """Put the active adapter into the weights, added in float32 and rounded once to the weights' own dtype.

    The original weights are kept until `unmerge` or `unload`. A second merge changes nothing.

    Raises:
        ConfigError: no adapter is in use.
    """
    if active_adapter(model) is None:
        raise ConfigError(f"merge needs an adapter in use; held are {', '.join(adapter_names(model)) or 'none'}")
    for _, module in wrappers(model):
        module.merge()


def unmerge(model: nn.Module) -> None:
    """Put the original weights back, bit for bit."""
    for _, module in wrappers(model):
        module.unmerge()


def unload(model: nn.Module) -> None:
    """Put the plain modules back, merged if they are merged, and let all adapters and originals go."""
    for name, module in list(wrappers(model)):
        _replace(model, name, module.base_layer)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict under the names that the model has without adapters: the base, or the merged weights.

    A projection in four bits gives its codes and scales.
    """
    adapters = tuple(f"{name}.adapters." for name, _ in wrappers(model))
    return {
        _WRAPPED_NAME.sub("", name): tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(adapters)
    }


def learning_rate_factors(model: nn.Module, lora_plus_ratio: float) -> dict[str, float]:
    """Return, for each trained parameter, what its learning rate is multiplied by (LoRA+).

    B learns `lora_plus_ratio` times as fast as A, because its gradient is as large as A is and begins at zero
    (Hayou et al. 2024, arXiv:2402.12354).
    """
    return {
        name: lora_plus_ratio if name.endswith(".lora_B") else 1.0
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _check_not_merged(model: nn.Module) -> None:
    if any(module.is_merged for _, module in wrappers(model)):
        raise ConfigError(f"adapter {active_adapter(model)!r} is merged into the weights; unmerge it first")
