"""The gated activation's gradients, in a form that mutants do not survive.

Expected output and gradients are float64 NumPy from the definition (`tests/ops/closed_forms.py`), for shapes without
two equal dimensions. Each named mutant changes one text of the operation's source; the comparison must see it.
"""

import importlib

import pytest

from .mutants import mutant
from .ops.closed_forms import TOLERANCE, caught_by, swiglu_problems, worst_error

NAME = "entrenar.ops.swiglu"
PROBLEMS = swiglu_problems()
MUTANTS: dict[str, tuple[str, str]] = {
    "scale of the gate": ("return silu(gate).mul_(up)", "return (gate * torch.sigmoid(1.702 * gate)).mul_(up)"),
    "gate and up exchanged": ("return silu(gate).mul_(up)", "return silu(up).mul_(gate)"),
    "gradients in another order": ("return dgate, dup", "return dup, dgate"),
    "derivative at another gate": (
        "grad_input(dgate, gate, grad_input=dgate)", "grad_input(dgate, up, grad_input=dgate)"),
    "derivative missing": ("torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)", "pass"),
    "upstream gradient missing": ("dgate = dy * up\n", "dgate = up.clone()\n"),
    "up missing in dgate": ("dgate = dy * up\n", "dgate = dy * 1\n"),
    "activation missing in dup": ("dup = silu(gate).mul_(dy)", "dup = torch.sigmoid(gate).mul_(dy)"),
    "gate detached": ("return apply(gate, up)", "return apply(gate.detach(), up)"),
    "wanted gradients exchanged": ("if ctx.needs_input_grad[1]:", "if not ctx.needs_input_grad[1]:"),
}  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_output_and_gradients_are_those_of_the_closed_form(problem, certificate):
    """The operation agrees with its definition to float64 rounding."""
    error = worst_error(problem, importlib.import_module(NAME))
    assert error < problem.rounding
    certificate.add("swiglu", "error", against="closed form", problem=problem.name, dtype="float64", relative=error)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name, certificate):
    """With one error planted an output or gradient is wrong."""
    assert caught_by(PROBLEMS, mutant(NAME, MUTANTS[name])), f"{name} survives a tolerance of {TOLERANCE}"
    certificate.add("swiglu", "controls", proof="closed form", planted=name)
