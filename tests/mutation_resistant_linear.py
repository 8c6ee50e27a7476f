"""The product's gradients, in a form that mutants do not survive.

Expected output and gradients are float64 NumPy from the definition (`tests/ops/closed_forms.py`), for shapes without
two equal dimensions. Each named mutant changes one text of the operation's source; the comparison must see it.
"""

import importlib

import pytest

from .mutants import mutant
from .ops.closed_forms import TOLERANCE, caught_by, linear_problems, worst_error

NAME = "entrenar.ops.linear"
PROBLEMS = linear_problems()
MUTANTS: dict[str, tuple[str, str]] = {
    "scale of dx": ("return dy @ weight  # ", "return 2 * dy @ weight  # "),
    "transpose missing in dweight": ("return dy.mT @ x", "return (x.mT @ dy).reshape(dy.shape[-1], x.shape[-1])"),
    "off by one in the rows": (
        "wide_x = x.reshape(-1, x.shape[-1])",
        "wide_x = x.reshape(-1, x.shape[-1]).roll(1, 0)",
    ),
    "sign of dweight": ("return dy.mT @ x", "return -dy.mT @ x"),
    "axis of the rows": (
        "wide_dy = dy.reshape(-1, dy.shape[-1])",
        "wide_dy = dy.transpose(0, 1).reshape(-1, dy.shape[-1])",
    ),
    "dweight dropped": ("if ctx.needs_input_grad[1]:", "if False:"),
    "dx dropped": ("if ctx.needs_input_grad[0]:", "if False:"),
}  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_output_and_gradients_are_those_of_the_closed_form(problem, certificate):
    """The operation agrees with its definition to float64 rounding."""
    error = worst_error(problem, importlib.import_module(NAME))
    assert error < problem.rounding
    certificate.add("linear", "error", against="closed form", problem=problem.name, dtype="float64", relative=error)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name, certificate):
    """With one error planted an output or gradient is wrong."""
    assert caught_by(PROBLEMS, mutant(NAME, MUTANTS[name])), f"{name} survives a tolerance of {TOLERANCE}"
    certificate.add("linear", "controls", proof="closed form", planted=name)
