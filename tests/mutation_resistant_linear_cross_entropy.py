"""The loss's gradients, in a form that mutants do not survive.

Expected output and gradients are float64 NumPy from the definition (`tests/ops/closed_forms.py`), for shapes without
two equal dimensions. Each named mutant changes one text of the operation's source; the comparison must see it.
"""

import importlib

import pytest

from .mutants import mutant
from .ops.closed_forms import TOLERANCE, caught_by, linear_cross_entropy_problems, worst_error

NAME = "entrenar.ops.linear_cross_entropy"
PROBLEMS = linear_cross_entropy_problems()
MUTANTS: dict[str, tuple[str, str]] = {
    "scale by the upstream gradient missing": ("scaled[block] = grad[block] * scale", "scaled[block] = grad[block]"),
    "transpose missing in dweight": (
        "add_product(dlogits.mT, tokens, out=dweight)",
        "add_product(dlogits.reshape(-1, len(dlogits)), tokens, out=dweight)",
    ),
    "off by one in the target": (
        "tokens, places = x[chunk].to(compute_dtype), targets[chunk, None]",
        "tokens, places = x[chunk].to(compute_dtype), (targets[chunk, None] + 1) % len(weight)",
    ),
    "off by one in the chunks": (
        "x[chunk].to(compute_dtype), targets[chunk, None]",
        "x[chunk].to(compute_dtype), targets.roll(1)[chunk, None]",
    ),
    "sign of the loss": ("loss -= log_probabilities", "loss += log_probabilities"),
    "sign of the one-hot": ("places.new_full(places.shape, -1,", "places.new_full(places.shape, 1,"),
    "mask of ignored tokens dropped": (
        "kept = (targets != ignore_index).nonzero()",
        "targets = targets.clamp_min(0)\n    kept = (targets != ignore_index).nonzero()",
    ),
    "axis of the softmax": (
        "torch.log_softmax(logits, dim=-1, out=logits)",
        "torch.log_softmax(logits, dim=0, out=logits)",
    ),
    "head detached": (
        "return apply(x, weight, targets, chunk_size,",
        "return apply(x, weight.detach(), targets, chunk_size,",
    ),
    "dweight of the last chunk alone": (
        "return out.addmm_(a, b) if a.dtype == out.dtype",
        "return torch.mm(a, b, out=out) if a.dtype == out.dtype",
    ),
    "loss of the last chunk alone": (
        "loss -= log_probabilities.gather(-1, places).sum()",
        "loss = -log_probabilities.gather(-1, places).sum()",
    ),
    "mean for sum": ("return loss\n\n    @staticmethod", "return loss / len(x)\n\n    @staticmethod"),
}  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_output_and_gradients_are_those_of_the_closed_form(problem, certificate):
    """The operation agrees with its definition to float64 rounding."""
    error = worst_error(problem, importlib.import_module(NAME))
    assert error < problem.rounding
    certificate.add(
        "linear_cross_entropy", "error", against="closed form", problem=problem.name, dtype="float64", relative=error
    )


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name, certificate):
    """With one error planted an output or gradient is wrong."""
    assert caught_by(PROBLEMS, mutant(NAME, MUTANTS[name])), f"{name} survives a tolerance of {TOLERANCE}"
    certificate.add("linear_cross_entropy", "controls", proof="closed form", planted=name)
