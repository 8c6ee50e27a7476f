"""The low-rank product's gradients, in a form that mutants do not survive.

Expected output and gradients are float64 NumPy from the definition (`tests/ops/closed_forms.py`), for shapes without
two equal dimensions. Each named mutant changes one text of the operation's source; the comparison must see it.
"""

import importlib

import pytest

from .mutants import mutant
from .ops.closed_forms import TOLERANCE, caught_by, lora_linear_problems, worst_error

NAME = "entrenar.ops.lora_linear"
PROBLEMS = lora_linear_problems()
MUTANTS: dict[str, tuple[str, str]] = {
    "scale missing in the output": ("y.addmm_(low, lora_b.mT, alpha=scale)", "y.addmm_(low, lora_b.mT)"),
    "scale missing in du": ("(dy @ lora_b).mul_(scale)", "(dy @ lora_b)"),
    "scale missing in dB": ("(low.mT @ dy).mul_(scale).mT", "(low.mT @ dy).mT"),
    "dropout's chance missing": ("scale = scale / chance", "scale = scale"),
    "dropout's chance multiplied": ("scale = scale / chance", "scale = scale * chance"),
    "transpose missing in dA": (
        "return dlow.mT @ (x if kept is None else x * kept)",
        "return ((x if kept is None else x * kept).mT @ dlow).reshape(dlow.shape[1], -1)",
    ),
    "transpose missing in dB": (".mul_(scale).mT  #", ".mul_(scale).reshape(dy.shape[1], -1)  #"),
    "off by one in the rows": ("linear_backward_weight(dy, rows)", "linear_backward_weight(dy, rows.roll(1, 0))"),
    "sign of the branch": ("return dx.addmm_(dlow, lora_a)", "return dx.addmm_(dlow, lora_a, alpha=-1)"),
    "mask missing in dx": ("dx.addcmul_(product, kept.to(dx.dtype))", "dx.add_(product)"),
    "mask missing in dA": ("dlow.mT @ (x if kept is None else x * kept)", "dlow.mT @ x"),
    "mask on the frozen product": (
        "linear_backward_weight(dy, rows)",
        "linear_backward_weight(dy, rows if kept is None else rows * kept)",
    ),
    "mask missing in the output": ("return (x if kept is None else x * kept) @", "return x @"),
    "axis of the rows": (
        "dy = dy.reshape(-1, dy.shape[-1]).to(wide)",
        "dy = dy.transpose(0, 1).reshape(-1, dy.shape[-1]).to(wide)",
    ),
    "adapter detached": (
        "return apply(x, weight, lora_a, lora_b, kept,",
        "return apply(x, weight, lora_a, lora_b.detach(), kept,",
    ),
    "frozen product missing in dx": ("dx = linear_backward_input(dy,", "dx = 0 * linear_backward_input(dy,"),
}  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_output_and_gradients_are_those_of_the_closed_form(problem, certificate):
    """The operation agrees with its definition to float64 rounding."""
    error = worst_error(problem, importlib.import_module(NAME))
    assert error < problem.rounding
    certificate.add(
        "lora_linear", "error", against="closed form", problem=problem.name, dtype="float64", relative=error
    )


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name, certificate):
    """With one error planted an output or gradient is wrong."""
    assert caught_by(PROBLEMS, mutant(NAME, MUTANTS[name])), f"{name} survives a tolerance of {TOLERANCE}"
    certificate.add("lora_linear", "controls", proof="closed form", planted=name)
