"""Count the trained parameters and the memory saved, from `requires_grad`, never from a formula."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from entrenar.peft.lora import wrappers
from entrenar.peft.quantized import quantized_projections


@dataclass(frozen=True)
class TrainedKind:
    """Trained tensors of one place and kind in all layers, such as q_proj.lora_A."""

    name: str
    shape: tuple[int, ...]
    tensors: int
    parameters: int


@dataclass(frozen=True)
class TrainableTable:
    """The trained parameters and the base's.

    Attributes:
        kinds: the trained tensors, alike ones in one row.
        base_parameters: all parameters of the model without adapters.
    """

    kinds: tuple[TrainedKind, ...]
    base_parameters: int

    @property
    def trained_parameters(self) -> int:
        """All trained parameters."""
        return sum(kind.parameters for kind in self.kinds)

    @property
    def saved_share(self) -> float:
        """By how much fewer parameters are trained than the base has, 0 … 1."""
        return 1 - self.trained_parameters / self.base_parameters

    def lines(self) -> Iterator[str]:
        """Yield the table as text."""
        for kind in self.kinds:
            shape = " × ".join(str(size) for size in kind.shape)
            yield f"{kind.name:<32} {kind.tensors:>4} of {shape:<14} {kind.parameters:>14,}"
        yield (
            f"trained: {self.trained_parameters:,} of {self.base_parameters:,} parameters "
            f"({100 * self.saved_share:.2f} % fewer)"
        )


def trainable_table(model: nn.Module) -> TrainableTable:
    """Count what is trained; a tied weight counts once."""
    adapters = {f"{name}.adapters." for name, _ in wrappers(model)}
    base = sum(math.prod(projection.shape) for _, projection in quantized_projections(model))
    kinds: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for name, parameter in model.named_parameters():
        owner = next((prefix for prefix in adapters if name.startswith(prefix)), None)
        if owner is None:
            base += parameter.numel()
        if parameter.requires_grad:
            kinds.setdefault((_kind(name), tuple(parameter.shape)), []).append(parameter.numel())
    return TrainableTable(
        tuple(TrainedKind(name, shape, len(sizes), sum(sizes)) for (name, shape), sizes in kinds.items()), base
    )


def _kind(name: str) -> str:
    """Return the last two descriptive words of a parameter's name; an adapter's name does not count."""
    module, _, rest = name.partition(".adapters.")
    part = rest.partition(".")[2] if rest else ""
    if not rest:
        module, _, part = name.rpartition(".")
    leaf = module.rpartition(".")[2]
    return f"{leaf}.{part}" if part else f"{leaf}.weight"
