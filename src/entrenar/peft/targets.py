"""From the words of a config to modules of a model, with an answer for every word that means nothing.

A projection can take an adapter when it lies in a numbered layer and has a matrix as its weight. Head and embedding do
not: the loss reads the head's weight and not its output, so an adapter there would be trained by nothing.
"""

import difflib
import re
from collections.abc import Iterable
from typing import cast

from torch import Tensor, nn

from entrenar.errors import ConfigError
from entrenar.peft.config import LoraConfig, matching_key
from entrenar.peft.quantized import BaseWeight, weight_of

_LAYER = re.compile(r"^(?:.*?\.)?[^.]+\.(\d+)\.")


def layer_number(module_name: str) -> int | None:
    """Return the number in a name like model.layers.3.mlp.up_proj, None outside the layers."""
    found = _LAYER.match(module_name)
    return int(found[1]) if found else None


def ends_in(module_name: str, end: str) -> bool:
    """Return whether a module's name is `end` or ends in it by whole parts."""
    return module_name == end or module_name.endswith(f".{end}")


def projections(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that can take an adapter, by name; one that has adapters already counts as itself."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        weight = weight_of(module)
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if layer_number(name) is not None and weight is not None and len(weight.shape) == 2 and not is_inside:
            found[name] = module
    return found


def find_targets(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Return the projections that `config` names.

    Raises:
        ConfigError: a word of the config matches nothing, or a rank is larger than its projection.
    """
    available = projections(model)
    named: dict[str, nn.Module] = {}
    for target in config.target_modules:
        matched = {name: module for name, module in available.items() if ends_in(name, target)}
        if not matched:
            raise ConfigError(_unknown_target(model, target, available))
        named |= matched
    numbers = config.layer_numbers(_count_layers(available))
    _check_layers(config.layers, numbers, available)
    targets = {name: module for name, module in available.items() if name in named and layer_number(name) in numbers}
    if not targets:
        raise ConfigError(
            f"target_modules {list(config.target_modules)} have no module in layers {sorted(numbers)}; "
            f"they lie in {sorted({layer_number(name) for name in named}, key=str)}"
        )
    _check_patterns(config, targets)
    for name, module in targets.items():
        shape = shape_of(module)
        if config.rank_of(name) > min(shape):
            raise ConfigError(
                f"rank must be <= {min(shape)}, the smaller width of {name} {shape}, "
                f"got {config.rank_of(name)}; at that rank train the module itself"
            )
    return targets


def find_saved(model: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Return the modules outside the layers that `modules_to_save` names.

    Raises:
        ConfigError: a name matches nothing, or a module that is more than one weight.
    """
    available = {
        name: module
        for name, module in model.named_modules()
        if layer_number(name) is None and isinstance(getattr(module, "weight", None), Tensor) and not _is_wrapped(name)
    }
    saved: dict[str, nn.Module] = {}
    for wanted in config.modules_to_save:
        matched = {name: module for name, module in available.items() if ends_in(name, wanted)}
        if not matched:
            raise ConfigError(
                f"modules_to_save: no module outside the layers is named {wanted!r}{_nearest(wanted, available)}; "
                f"there are {_leaves(available)}"
                + (" (this model's head is tied: it is embed_tokens)" if wanted == "lm_head" else "")
            )
        saved |= matched
    return saved


def _is_wrapped(name: str) -> bool:
    return ends_in(name, "base_layer")


def shape_of(module: nn.Module) -> tuple[int, ...]:
    """Return the shape of a module's weight."""
    return tuple(cast(BaseWeight, weight_of(module)).shape)


def _count_layers(available: Iterable[str]) -> int:
    return 1 + max((number for name in available if (number := layer_number(name)) is not None), default=-1)


def _check_layers(layers: str | tuple[int, ...], numbers: set[int], available: Iterable[str]) -> None:
    count = _count_layers(available)
    outside = sorted(number for number in numbers if not 0 <= number < count)
    if outside and isinstance(layers, str):
        raise ConfigError(f"layers must be top:{count} at most, for the model has {count}; got {layers}")
    if outside:
        raise ConfigError(f"layers must lie in 0 … {count - 1}, for the model has {count}; got {outside}")


def _check_patterns(config: LoraConfig, targets: Iterable[str]) -> None:
    names = list(targets)
    for field, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        used = {matching_key(pattern, name) for name in names}
        for unused in [key for key in pattern if key not in used]:
            raise ConfigError(f"{field}: {unused!r} matches no target module; there are {_leaves(names)}")


def _unknown_target(model: nn.Module, target: str, available: Iterable[str]) -> str:
    names = list(available)
    outside = [name for name, _ in model.named_modules() if ends_in(name, target)]
    if outside and layer_number(outside[0]) is None:
        return (
            f"target_modules: {outside[0]} cannot take a low-rank adapter, only projections of the layers can; "
            f"put it into modules_to_save to train it in full"
        )
    return f"target_modules: no projection is named {target!r}{_nearest(target, names)}; there are {_leaves(names)}"


def _leaves(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names)) or "none"


def _nearest(wanted: str, names: Iterable[str]) -> str:
    leaves = {name.rpartition(".")[2] for name in names}
    match = difflib.get_close_matches(wanted, sorted(leaves), n=1)
    return f", did you mean {match[0]}?" if match else ""
