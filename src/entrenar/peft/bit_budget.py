"""Give each matrix of a base its width, so that the whole meets a budget of bits and the loss rises least.

What rounding a matrix costs is estimated to second order from one forward and backward over a calibration text. With dy
the gradient of the loss at the product's output for a token, x its input and D the error of the weight, the loss rises
by about

    ½ Σ over tokens (dy · D x)²                                                       (1)

which is the Fisher information of the weight along D, the tokens taken as independent (LeCun et al. 1990, "Optimal
brain damage"; Kim et al. 2023, arXiv:2306.07629, weighs by its diagonal). It needs no forward for each matrix: D for
all widths is made where dy is at hand. For the head, whose output is the logits z with probabilities p, the rise is

    ½ Σ over tokens of the variance of D x under p                                    (2)

The budget is then spent where it helps most: all matrices begin at the least width, and the step that lowers the rise
most for a byte is taken until no step fits (Fox 1966, "Discrete optimization via marginal analysis"). Steps that a
larger one dominates are passed over, so that a matrix may go from 2 to 4 bits at once.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from entrenar import ops
from entrenar.errors import ConfigError
from entrenar.ops.quantized.bits import WIDTHS

# Logits of this many tokens at once.
_TOKENS_AT_ONCE = 256


@dataclass(frozen=True)
class Cost:
    """What a matrix costs at a width."""

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


def rounding_errors(weight: Float[Tensor, "O I"]) -> Iterator[tuple[int, Float[Tensor, "O I"]]]:
    """Yield each width and the error D of the weight in it, in float32."""
    plain = weight.detach().float()
    for bits in WIDTHS:
        yield bits, ops.dequantize_nf_bits(ops.quantize_nf_bits(plain, bits, is_draft=True)) - plain


@contextmanager
def watched_projections(projections: Mapping[str, nn.Module], losses: dict[str, dict[int, float]]) -> Iterator[None]:
    """Add equation (1) of each projection and width to `losses`, at each backward inside.

    The inputs must require a gradient, the weights need not.
    """

    def watch(name: str, module: nn.Module) -> Callable[..., None]:
        def on_forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            output.register_hook(lambda dy: add(name, module, x, dy))  # type: ignore[no-untyped-call]  # torch's own

        return on_forward

    def add(name: str, module: nn.Module, x: Tensor, dy: Tensor) -> None:
        rows, drows = x.flatten(0, -2).float(), dy.flatten(0, -2).float()  # (N, I), (N, O)
        for bits, error in rounding_errors(module.get_parameter("weight")):
            rise = 0.5 * float(((rows @ error.mT) * drows).sum(1).square().sum())
            losses[name][bits] = losses[name].get(bits, 0.0) + rise

    handles = [module.register_forward_hook(watch(name, module)) for name, module in projections.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def embedding_losses(
    weight: Float[Tensor, "V D"], ids: Int[Tensor, " N"], dx: Float[Tensor, "N D"]
) -> dict[int, float]:
    """Return equation (1) of an embedding, whose error at a token is a row of D."""
    return {
        bits: 0.5 * float((error[ids] * dx.float()).sum(1).square().sum()) for bits, error in rounding_errors(weight)
    }


def head_losses(weight: Float[Tensor, "V D"], x: Float[Tensor, "N D"]) -> dict[int, float]:
    """Return equation (2) of a head."""
    losses: dict[int, float] = {}
    plain, rows = weight.detach().float(), x.detach().float()
    for bits, error in rounding_errors(weight):
        losses[bits] = 0.0
        for part in rows.split(_TOKENS_AT_ONCE):  # type: ignore[no-untyped-call]  # torch's own
            shares, moved = torch.softmax(part @ plain.mT, -1), part @ error.mT  # (n, V)
            mean = (shares * moved).sum(1, keepdim=True)
            losses[bits] += 0.5 * float((shares * (moved - mean).square_()).sum())
    return losses


class InputMoments:
    """Sums xᵀx over all inputs that some modules are given: what their errors are weighed by."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.sums: dict[str, Tensor] = {}
        self._handles = [module.register_forward_pre_hook(self._adder(name)) for name, module in modules.items()]

    def _adder(self, name: str) -> Callable[..., None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2).float()  # (N, I)
            if name in self.sums:
                self.sums[name].addmm_(rows.mT, rows)
            else:
                self.sums[name] = rows.mT @ rows

        return add

    def close(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()


def is_matrix(module: nn.Module) -> bool:
    """Return whether a module has a matrix of weights."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Return rows and width of a module's matrix."""
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
