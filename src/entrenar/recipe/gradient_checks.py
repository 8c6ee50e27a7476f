"""Check the gradients of a small model on this machine and install, in float64.

Three ways of computing the same sum must agree to rounding, and the derived backward must agree with finite
differences. `numerics` does the same on a user's own config.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from entrenar.model import Llama, LlamaConfig
from entrenar.ops import DocumentSpans

# Equal sums in another order differ by rounding; a finite difference also by its step.
_ROUNDING, _STENCIL = 1e-12, 1e-6
_STEP = 1e-4

_Piece = tuple[Tensor, Tensor, DocumentSpans | None]


@dataclass(frozen=True)
class GradientCheck:
    """A check to run: `measure` returns the largest relative difference, with `tolerance` as its upper bound."""

    name: str
    tolerance: float
    measure: Callable[[], float]


def gradient_checks() -> Iterator[GradientCheck]:
    """Yield the checks; they share one model of two layers."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, intermediate_size=48, max_seq_len=32
    )
    model = Llama(config).double()
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    ids = torch.randint(0, 64, (4, 16), generator=generator)
    targets = torch.randint(0, 64, (4, 16), generator=generator)
    targets[0, :5] = -100
    documents = (((0, 7), (7, 16)),) * 4
    whole = _gradient(model, [(ids, targets, None)])
    packed = _gradient(model, [(ids, targets, documents)])

    def split() -> float:
        pieces = [(ids[row : row + 1], targets[row : row + 1], None) for row in range(4)]
        return _distance(whole, _gradient(model, pieces))

    def checkpointed() -> float:
        model.checkpointing = "full"
        try:
            return _distance(whole, _gradient(model, [(ids, targets, None)]))
        finally:
            model.checkpointing = "none"

    def unpacked() -> float:
        parts = [(ids[:, :7], targets[:, :7], None), (ids[:, 7:], targets[:, 7:], None)]
        return _distance(packed, _gradient(model, parts))

    yield GradientCheck("micro-batches = whole batch", _ROUNDING, split)
    yield GradientCheck("activation checkpointing = none", _ROUNDING, checkpointed)
    yield GradientCheck("packed documents = each alone", _ROUNDING, unpacked)
    yield GradientCheck(
        "derived backward = finite differences", _STENCIL, lambda: _finite_difference(model, ids, targets, whole)
    )


def _gradient(model: Llama, pieces: Sequence[_Piece]) -> Float[Tensor, " numbers"]:
    model.zero_grad(set_to_none=True)
    for ids, targets, documents in pieces:
        model.loss(ids, targets, documents=documents).backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


def _finite_difference(
    model: Llama, ids: Int[Tensor, "B T"], targets: Int[Tensor, "B T"], gradient: Float[Tensor, " numbers"]
) -> float:
    """Return how far the directional derivative by a five-point stencil is from the gradient's."""
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
    parameters = list(model.parameters())
    start = torch.nn.utils.parameters_to_vector(parameters).detach()

    def loss_at(offset: float) -> float:
        torch.nn.utils.vector_to_parameters(start + offset * direction, parameters)
        with torch.no_grad():
            return float(model.loss(ids, targets))

    slope = (loss_at(-2 * _STEP) - 8 * loss_at(-_STEP) + 8 * loss_at(_STEP) - loss_at(2 * _STEP)) / (12 * _STEP)
    torch.nn.utils.vector_to_parameters(start, parameters)
    exact = float(gradient @ direction)
    return abs(slope - exact) / abs(exact)
