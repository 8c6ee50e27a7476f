"""Round a whole model to a budget of bits, layer by layer.

A layer is rounded on the inputs that the layers before it, already rounded, give it, so that it makes up for a part of
their errors (Frantar et al. 2022, arXiv:2210.17323, section 4).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor, nn

from entrenar import ops
from entrenar.errors import DataError
from entrenar.model import Llama
from entrenar.ops import NfBitsWeight
from entrenar.ops.quantized.bits import WIDTHS
from entrenar.peft import put_quantized
from entrenar.peft.layers import leading_factors
from entrenar.quantize.budget import EMBEDDING, HEAD, Budget, Cost, allocate, check_budget, is_matrix, matrix_shape
from entrenar.quantize.calibration import InputMoments
from entrenar.quantize.sensitivity import sensitivities

# Rows whose backward is taken to estimate what rounding costs; the moments of inputs take all of them.
_SENSITIVITY_ROWS = 8
_ROWS_AT_ONCE = 4
# The share of a projection's rise that remains when codes and adapter are fitted to each other (docs/log.md); embedding
# and head have no adapter.
_LEFT_BY_ADAPTER = 0.5
# Projections that are given the same input as another: its second moments serve them too.
_SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True)
class Adapters:
    """Adapters that will start by making up for the rounding (LoftQ, arXiv:2310.08659, algorithm 1).

    Attributes:
        ranks: by the name of the projection.
        turns: how often codes and adapter are fitted to each other.
    """

    ranks: Mapping[str, int]
    turns: int


NO_ADAPTERS = Adapters({}, 0)


def quantize_to_budget(
    model: Llama,
    rows: Int[Tensor, "rows length"],
    bits: float,
    on_stage: Callable[[str], None],
    adapters: Adapters = NO_ADAPTERS,
) -> Budget:
    """Quantize every matrix of the model in place, so that all weights together take `bits` bits each at most.

    Raises:
        ConfigError: the budget is less than the least widths take; the message says what is possible.
        DataError: a weight is NaN or infinite.
    """
    matrices = {name: module for name, module in model.named_modules() if is_matrix(module)}
    for name, module in matrices.items():
        if not bool(module.get_parameter("weight").isfinite().all()):
            raise DataError(f"{name}.weight must be finite to be quantized, got NaN or infinity; repair it first")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    kept = sum(parameter.nbytes for parameter in model.parameters() if parameter.ndim == 1)
    shapes = {name: matrix_shape(module) for name, module in matrices.items()}
    sizes = {name: {bits: ops.nf_bits_size(shape, bits) for bits in WIDTHS} for name, shape in shapes.items()}
    check_budget(model, bits)
    on_stage(f"Estimating what rounding {len(matrices)} matrices costs, on {len(rows[:_SENSITIVITY_ROWS])} rows")
    losses = sensitivities(model, matrices, rows[:_SENSITIVITY_ROWS])
    left = {name: _LEFT_BY_ADAPTER if name in adapters.ranks else 1.0 for name in matrices}
    costs = {name: {w: Cost(sizes[name][w], losses[name][w] * left[name]) for w in WIDTHS} for name in matrices}
    widths = allocate(costs, bits * numbers / 8 - kept)
    on_stage(f"Rounding layer by layer, on {rows.numel():,} tokens")
    with torch.no_grad():
        _quantize(model, widths, rows, adapters)
    spent = kept + sum(sizes[name][width] for name, width in widths.items())
    targets = rows[:_SENSITIVITY_ROWS, 1:].numel()
    return Budget(widths, spent, numbers, sum(costs[name][width].loss for name, width in widths.items()) / targets)


def _quantize(model: Llama, widths: Mapping[str, int], rows: Tensor, adapters: Adapters) -> None:
    """Round embedding, layers and head in the order in which a token meets them, each layer with its adapters."""
    decoder = model.model
    parts = [part[:, :-1] for part in torch.split(rows, _ROWS_AT_ONCE)]
    _put(model, EMBEDDING, widths, None if HEAD in widths else _moments_of_tied_head(model, parts))
    states = [decoder.embed_tokens(part) for part in parts]
    for layer, block in enumerate(decoder.layers):
        names = {f"model.layers.{layer}.{name}": module for name, module in block.named_modules() if is_matrix(module)}
        moments = InputMoments({name: module for name, module in names.items() if _source(name) == name})
        for state in states:
            model.through(state, layer, layer + 1)
        moments.close()
        adapted: dict[str, NfBitsWeight] = {}
        for name, module in names.items():
            inputs = moments.sums[_source(name)]
            if name not in adapters.ranks:
                _put(model, name, widths, inputs)
                continue
            weight = module.get_parameter("weight")
            adapted[name], both = _round_for(adapters.ranks[name], adapters.turns, weight, widths[name], inputs)
            module.weight = nn.Parameter(both.to(weight.dtype), requires_grad=False)
        states = [model.through(state, layer, layer + 1) for state in states]
        for name, rounded in adapted.items():
            put_quantized(model, name, rounded, model.dtype)
    if HEAD in widths:
        _put(model, HEAD, widths, _sum_of_squares(decoder.norm(state) for state in states))


def _sum_of_squares(states: Iterable[Tensor]) -> Tensor:
    return sum((rows.mT @ rows for state in states for rows in [state.flatten(0, -2).float()]), torch.zeros(()))


def _moments_of_tied_head(model: Llama, parts: Sequence[Tensor]) -> Tensor:
    """Return what weighs the errors of a matrix that is the head and the embedding too.

    As a head its inputs are the final states; what a row's error does as an embedding is alike in all directions.
    """
    moments = _sum_of_squares(model.hidden(part) for part in parts)
    moments.diagonal().add_(moments.diagonal().mean())
    return moments


def _source(name: str) -> str:
    parent, _, own = name.rpartition(".")
    return f"{parent}.{_SAME_INPUT.get(own, own)}"


def _round_for(rank: int, turns: int, weight: Tensor, bits: int, moments: Tensor) -> tuple[NfBitsWeight, Tensor]:
    """Return Q and Q + B A, a weight's rounding and the adapter of that rank, each in turn made for the other."""
    plain, rounded = weight.float(), ops.quantize_nf_bits(weight.float(), bits, moments)
    for turn in range(turns):
        wide = rounded.dequantize()
        lora_a, lora_b = leading_factors(plain - wide, rank)
        if turn < turns - 1:
            rounded = ops.quantize_nf_bits(plain - lora_b @ lora_a, bits, moments)
    return rounded, wide.addmm_(lora_b, lora_a)


def _put(model: Llama, name: str, widths: Mapping[str, int], moments: Tensor | None) -> None:
    weight = model.get_submodule(name).get_parameter("weight")
    put_quantized(model, name, ops.quantize_nf_bits(weight.float(), widths[name], moments), weight.dtype)
