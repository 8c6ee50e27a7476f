"""Give each matrix of a base its width, so that the whole meets a budget of bits and the loss rises least.

`sensitivity` estimates how much the loss rises when a matrix is rounded to a width. The budget is spent where it helps
most: all matrices begin at the least width, and the step that lowers the rise most for a byte is taken until no step
fits (Fox 1966, "Discrete optimization via marginal analysis"). Steps that a larger one dominates are passed over, so a
matrix may go from 2 to 4 bits at once.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from entrenar import ops
from entrenar.errors import ConfigError
from entrenar.ops.quantized.bits import WIDTHS

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


@dataclass(frozen=True)
class Cost:
    """The cost of a matrix at a width."""

    size_bytes: int
    loss: float


Costs = Mapping[str, Mapping[int, Cost]]


def allocate(costs: Costs, budget_bytes: float) -> dict[str, int]:
    """Return the width of each matrix, so that the loss is least within a budget.

    Raises:
        ConfigError: even the least widths take more; the message says how much they take.
    """
    widths = {name: min(choices, key=lambda bits: choices[bits].size_bytes) for name, choices in costs.items()}
    spent = sum(costs[name][bits].size_bytes for name, bits in widths.items())
    if spent > budget_bytes:
        raise ConfigError(f"the matrices take {spent:,} bytes at the least widths, {budget_bytes:,.0f} are allowed")
    while steps := list(_steps(costs, widths, budget_bytes - spent)):
        _, name, bits = max(steps)
        spent += costs[name][bits].size_bytes - costs[name][widths[name]].size_bytes
        widths[name] = bits
    return widths


def _steps(costs: Costs, widths: Mapping[str, int], left_bytes: float) -> Iterator[tuple[float, str, int]]:
    """Yield the gain for a byte, name and new width of each matrix' best step that fits."""
    for name, choices in costs.items():
        here = choices[widths[name]]
        fitting = [
            ((here.loss - cost.loss) / (cost.size_bytes - here.size_bytes), name, bits)
            for bits, cost in choices.items()
            if here.size_bytes < cost.size_bytes <= here.size_bytes + left_bytes and cost.loss < here.loss
        ]
        if fitting:
            yield max(fitting)


@dataclass(frozen=True)
class Budget:
    """The result of quantizing.

    Attributes:
        widths: bits of a code, by the name of the matrix.
        size_bytes: all weights as they are stored now, norms included.
        numbers: how many weights there are.
        expected_rise: the estimated rise of the loss of a calibration token, in nats, were each weight rounded to the
            nearest: moving errors to later columns reduces this rise.
    """

    widths: Mapping[str, int]
    size_bytes: int
    numbers: int
    expected_rise: float

    @property
    def bits(self) -> float:
        """Bits a weight, everything included."""
        return 8 * self.size_bytes / self.numbers

    def lines(self) -> list[str]:
        """Return the budget for people."""
        counts = Counter(self.widths.values())
        outside = [f"{name} {bits}" for name, bits in self.widths.items() if name in (EMBEDDING, HEAD)]
        return [
            f"budget        {self.bits:.3f} bits a weight, {self.size_bytes:,} bytes for {self.numbers:,} weights",
            "widths        " + ", ".join(f"{counts[bits]} of {bits} bits" for bits in sorted(counts)),
            f"              {', '.join(outside)} bits",
            f"loss          expected to rise by {self.expected_rise:.3g} nats a token by rounding to the nearest",
        ]


def is_matrix(module: nn.Module) -> bool:
    """Return whether a module is one matrix."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Return the shape of a module's matrix."""
    rows, width = module.get_parameter("weight").shape
    return rows, width


def check_budget(model: nn.Module, bits: float, stored: torch.dtype | None = None) -> None:
    """Check that a plain model can be held in `bits` bits a weight; shapes are enough, norms held as `stored`.

    Raises:
        ConfigError: with the least that is possible.
    """
    matrices = [matrix_shape(module) for module in model.modules() if is_matrix(module)]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    kept = sum(norm.numel() * (stored or norm.dtype).itemsize for norm in norms)
    rounded = sum(ops.nf_bits_size(shape, min(WIDTHS)) for shape in matrices)
    least = 8 * (kept + rounded) / sum(parameter.numel() for parameter in model.parameters())
    if not bits >= least:
        raise ConfigError(
            f"--bits must be >= {math.ceil(least * 1000) / 1000:.3f} for this model, got {bits:g}: that is every "
            f"matrix in {min(WIDTHS)} bits with its scales, and the norms as they are stored"
        )
