"""The rotation's gradient, in a form that mutants do not survive.

Expected output and gradients are float64 NumPy from the definition (`tests/ops/closed_forms.py`), for shapes without
two equal dimensions. Each named mutant changes one text of the operation's source; the comparison must see it.
"""

import importlib

import pytest

from .mutants import mutant
from .ops.closed_forms import TOLERANCE, caught_by, rope_problems, worst_error

NAME = "entrenar.ops.rope"
PROBLEMS = rope_problems()
MUTANTS: dict[str, tuple[str, str]] = {
    "scale of the angle": ("first * cos - second * sin, second", "first * cos - second * sin * 2, second"),
    "rotation not transposed": ("rope_forward(dfirst, dsecond, cos, -sin)", "rope_forward(dfirst, dsecond, cos, sin)"),
    "off by one in the half": (
        "half = torch.promote_types(x.dtype, torch.float32), x.shape[-1] // 2\n",
        "half = torch.promote_types(x.dtype, torch.float32), x.shape[-1] // 2\n    cos = cos.roll(1, 1)\n",
    ),
    "sign of the first sine": ("first * cos - second * sin", "first * cos + second * sin"),
    "sign of the second sine": ("second * cos + first * sin", "second * cos - first * sin"),
    "axis of the table": (
        "x.shape[0], -1, -1).unsqueeze(1) for table in (cos, sin))",
        "x.shape[0], -1, -1).flip(2).unsqueeze(1) for table in (cos, sin))",
    ),
    "halves swapped": ("block[..., :half], block[..., half:]", "block[..., half:], block[..., :half]"),
    "input detached": (
        "return apply(x, cos, sin)",
        "return apply(x.detach(), cos, sin) + 0 * x",
    ),
}  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_output_and_gradients_are_those_of_the_closed_form(problem, certificate):
    """The operation agrees with its definition to float64 rounding."""
    error = worst_error(problem, importlib.import_module(NAME))
    assert error < problem.rounding
    certificate.add("rope", "error", against="closed form", problem=problem.name, dtype="float64", relative=error)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name, certificate):
    """With one error planted an output or gradient is wrong."""
    assert caught_by(PROBLEMS, mutant(NAME, MUTANTS[name])), f"{name} survives a tolerance of {TOLERANCE}"
    certificate.add("rope", "controls", proof="closed form", planted=name)
