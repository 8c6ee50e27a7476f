"""RMS normalization's gradients, in a form that mutants do not survive.

Expected output and gradients are float64 NumPy from the definition (`tests/ops/closed_forms.py`), for shapes without
two equal dimensions. Each named mutant changes one text of the operation's source; the comparison must see it.
"""

import importlib

import pytest

from .mutants import mutant
from .ops.closed_forms import TOLERANCE, caught_by, rms_norm_problems, worst_error

NAME = "entrenar.ops.rms_norm"
PROBLEMS = rms_norm_problems()
MUTANTS: dict[str, tuple[str, str]] = {
    "scale missing in dx": ("rstd * rstd * rstd / x.shape[-1]", "rstd * rstd * rstd"),
    "scale missing in dweight": ("(rstd.mT @ (dy * x))", "((rstd.mT * 0 + 1) @ (dy * x))"),
    "power of the deviation": ("rstd * rstd * rstd / x.shape[-1]", "rstd * rstd / x.shape[-1]"),
    "transpose missing in dweight": (
        "return (rstd.mT @ (dy * x)).squeeze(0)",
        "return (rstd * (dy * x)).mean(0) * x.shape[-1]",
    ),
    "off by one in the width": ("rstd * rstd * rstd / x.shape[-1]", "rstd * rstd * rstd / (x.shape[-1] + 1)"),
    "sign of the projection": ("dy * weight * rstd - x *", "dy * weight * rstd + x *"),
    "sign of eps": ("keepdim=True) + eps)  # (1)", "keepdim=True) - eps)  # (1)"),
    "axis of the mean": (
        "(x * x).mean(-1, keepdim=True) + eps)  # (1)",
        "(x * x).mean(0, keepdim=True).mean(-1, keepdim=True).expand(len(x), 1) + eps)  # (1)",
    ),
    "sum for mean": ("(x * x).mean(-1, keepdim=True) + eps)  # (1)", "(x * x).sum(-1, keepdim=True) + eps)  # (1)"),
    "weight dropped from the projection": ("(dy * x) @ weight.unsqueeze(-1)", "(dy * x).sum(-1, keepdim=True)"),
    "deviation detached": ("dy * weight * rstd - x * (projection", "dy * weight * rstd - 0 * x * (projection"),
    "weight detached": ("return apply(x, weight, eps)", "return apply(x, weight.detach(), eps)"),
    "dweight of the last block": ("dweight += rms_norm", "dweight = 0.5 * rms_norm"),
}  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_output_and_gradients_are_those_of_the_closed_form(problem, certificate):
    """The operation agrees with its definition to float64 rounding."""
    error = worst_error(problem, importlib.import_module(NAME))
    assert error < problem.rounding
    certificate.add("rms_norm", "error", against="closed form", problem=problem.name, dtype="float64", relative=error)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name, certificate):
    """With one error planted an output or gradient is wrong."""
    assert caught_by(PROBLEMS, mutant(NAME, MUTANTS[name])), f"{name} survives a tolerance of {TOLERANCE}"
    certificate.add("rms_norm", "controls", proof="closed form", planted=name)
