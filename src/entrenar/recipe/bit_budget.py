"""Quantize a whole model to a budget of bits: calibrate, give each matrix its width, round layer by layer.

A layer is rounded on the inputs that the layers before it, rounded already, give it, so that it makes up for a part of
what they do wrong (Frantar et al. 2022, arXiv:2210.17323, section 4).
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor, nn

from entrenar import ops
from entrenar.data import Tokenizer
from entrenar.errors import DataError
from entrenar.infer import GenerateConfig, generate
from entrenar.interop.convert import Rounded, Source
from entrenar.model import Llama
from entrenar.ops import NfBitsWeight
from entrenar.ops.quantized.bits import WIDTHS
from entrenar.peft import put_quantized
from entrenar.peft.bit_budget import (
    Cost,
    InputMoments,
    allocate,
    check_budget,
    embedding_losses,
    head_losses,
    is_matrix,
    matrix_shape,
    watched_projections,
)
from entrenar.peft.layers import leading_factors

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
CALIBRATION_ROWS, CALIBRATION_LENGTH = 32, 256
# Rows whose backward is taken to estimate what rounding costs; the moments of inputs take all of them.
_SENSITIVITY_ROWS = 8
_ROWS_AT_ONCE = 4
# What is left of a projection's rise when codes and adapter are made for each other (docs/log.md); of the embedding's
# and the head's all is.
_LEFT_BY_ADAPTER = 0.5
# Projections that are given the same input as another: its second moments serve them too.
_SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True)
class Adapters:
    """Adapters that will begin by making up for the rounding (LoftQ, arXiv:2310.08659, algorithm 1).

    Attributes:
        ranks: by the name of the projection.
        turns: how often codes and adapter are made for each other.
    """

    ranks: Mapping[str, int]
    turns: int


_NO_ADAPTERS = Adapters({}, 0)


@dataclass(frozen=True)
class Budget:
    """What quantizing came to.

    Attributes:
        widths: bits of a code, by the name of the matrix.
        size_bytes: all weights as they are stored now, norms included.
        numbers: how many weights there are.
        expected_rise: the estimated rise of the loss of a calibration token, in nats, were each weight rounded to the
            nearest: moving errors to later columns takes a part of it away.
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


def round_to_budget(
    source: Source,
    bits: float,
    calibration: Path | None,
    on_stage: Callable[[str], None],
    adapters: Adapters = _NO_ADAPTERS,
) -> tuple[Source, Budget]:
    """Return a source that is written with its matrices rounded to a budget, and what that came to.

    Raises:
        ConfigError, DataError: see `quantize_to_budget` and `calibration_rows`.
    """
    if source.tokenizer is None:
        raise DataError(
            "a budget of bits needs a tokenizer to calibrate with, and the model has none; give --tokenizer"
        )
    # Modules of its own over the same weights: what is compared with it afterwards must stay as it was.
    model = copy.deepcopy(source.model, {id(parameter): parameter for parameter in source.model.parameters()})
    model.set_compute_dtype(ops.fastest_compute_dtype(model.dtype, model.device))
    rows = calibration_rows(model, source.tokenizer, calibration)
    budget = quantize_to_budget(model, rows, bits, on_stage, adapters)
    return replace(source, rounded=Rounded(model, budget.bits)), budget


def calibration_rows(model: Llama, tokenizer: Tokenizer, text: Path | None) -> Int[Tensor, "rows length"]:
    """Return tokens to calibrate on: those of a text, or else what the model itself writes (arXiv:2305.17888).

    Raises:
        DataError: the text cannot be read, or is shorter than two rows.
    """
    length = min(CALIBRATION_LENGTH, model.config.context_length - 1) + 1
    if text is None:
        return _written_rows(model, tokenizer, length)
    try:
        ids = tokenizer.encode(text.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"calibration text {text} cannot be read: {error}") from error
    rows = min(len(ids) // length, CALIBRATION_ROWS)
    if rows < 2:
        raise DataError(f"a calibration text must have at least {2 * length} tokens, got {len(ids)} in {text}")
    # Spread over the whole of it: a file often begins with what is not like the rest.
    starts = torch.linspace(0, len(ids) - length, rows).long()
    return torch.tensor(ids)[starts[:, None] + torch.arange(length)]


def _written_rows(model: Llama, tokenizer: Tokenizer, length: int) -> Tensor:
    first = tokenizer.bos_id if tokenizer.bos_id is not None else 0
    rows: list[list[int]] = [[first] for _ in range(CALIBRATION_ROWS)]
    config = GenerateConfig(max_new_tokens=length - 1, eos_token_ids=())
    for step in generate(model, rows, config):
        for row, token in zip(rows, step, strict=True):
            row.append(first if token is None else token)
    return torch.tensor(rows)


def quantize_to_budget(
    model: Llama,
    rows: Int[Tensor, "rows length"],
    bits: float,
    on_stage: Callable[[str], None],
    adapters: Adapters = _NO_ADAPTERS,
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


def sensitivities(
    model: Llama, matrices: Mapping[str, nn.Module], rows: Int[Tensor, "rows length"]
) -> dict[str, dict[int, float]]:
    """Return the estimated rise of the loss, summed over the rows' targets, for each matrix and width."""
    losses: dict[str, dict[int, float]] = {name: {} for name in matrices}
    model.requires_grad_(requires_grad=False)
    model.eval()
    states: list[Tensor] = []
    embedded = model.model.embed_tokens.register_forward_hook(lambda _, __, out: states.append(out.requires_grad_()))
    projections = {name: module for name, module in matrices.items() if name not in (EMBEDDING, HEAD)}
    ids, head = rows[:, :-1], cast(Tensor, model.head_weight)
    try:
        with watched_projections(projections, losses):
            hidden = model.hidden(ids).flatten(0, 1)
            targets = rows[:, 1:].flatten()
            torch.autograd.backward(ops.linear_cross_entropy(hidden, head, targets, compute_dtype=model.compute_dtype))
    finally:
        embedded.remove()
    gradient = cast(Tensor, states[0].grad)
    of_embedding = embedding_losses(model.model.embed_tokens.weight, ids.flatten(), gradient.flatten(0, 1))
    of_head = head_losses(head, hidden)
    is_tied = HEAD not in matrices
    losses[EMBEDDING] = {w: of_embedding[w] + (of_head[w] if is_tied else 0.0) for w in WIDTHS}
    if not is_tied:
        losses[HEAD] = of_head
    return losses


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
        wide = ops.dequantize(rounded)
        lora_a, lora_b = leading_factors(plain - wide, rank)
        if turn < turns - 1:
            rounded = ops.quantize_nf_bits(plain - lora_b @ lora_a, bits, moments)
    return rounded, wide.addmm_(lora_b, lora_a)


def _put(model: Llama, name: str, widths: Mapping[str, int], moments: Tensor | None) -> None:
    weight = model.get_submodule(name).get_parameter("weight")
    put_quantized(model, name, ops.quantize_nf_bits(weight.float(), widths[name], moments), weight.dtype)
