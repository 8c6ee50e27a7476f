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
    "scale missing in the output": ("lora_b.to(compute_dtype).mT, alpha=scale)", "lora_b.to(compute_dtype).mT)"),
    "scale missing in du": ("(dy @ lora_b.to(wide)).mul_(ctx.scale)", "(dy @ lora_b.to(wide))"),
    "scale missing in dB": ("(low.mT @ dy).mul_(ctx.scale)", "(low.mT @ dy)"),
    "dropout's chance missing": ("scale = scale / chance", "scale = scale"),
    "dropout's chance multiplied": ("scale = scale / chance", "scale = scale * chance"),
    "transpose missing in dA": (
        "dlora_a = (dlow.mT @ (rows if kept is None else rows * kept))",
        "dlora_a = ((rows if kept is None else rows * kept).mT @ dlow).reshape(lora_a.shape)",
    ),
    "transpose missing in dB": (
        "(low.mT @ dy).mul_(ctx.scale).mT.to",
        "(low.mT @ dy).mul_(ctx.scale).reshape(lora_b.shape).to",
    ),
    "off by one in the rows": ("dweight = (dy.mT @ rows)", "dweight = (dy.mT @ rows.roll(1, 0))"),
    "sign of the branch": ("return dx.addmm_(dlow, lora_a)", "return dx.addmm_(dlow, lora_a, alpha=-1)"),
    "mask missing in dx": ("return dx.addcmul_(dlow @ lora_a, kept.to(dx.dtype))", "return dx.addmm_(dlow, lora_a)"),
    "mask missing in dA": ("(rows if kept is None else rows * kept)).to(lora_a.dtype)", "rows).to(lora_a.dtype)"),
    "mask on the frozen product": (
        "dweight = (dy.mT @ rows)",
        "dweight = (dy.mT @ (rows if kept is None else rows * kept))",
    ),
    "mask missing in the output": (
        "dropped = rows if kept is None else rows *",
        "dropped = rows if kept is None else rows + 0 *",
    ),
    "axis of the rows": (
        "dy = dy.reshape(-1, dy.shape[-1]).to(wide)",
        "dy = dy.transpose(0, 1).reshape(-1, dy.shape[-1]).to(wide)",
    ),
    "adapter detached": (
        "return apply(x, weight, lora_a, lora_b, kept,",
        "return apply(x, weight, lora_a, lora_b.detach(), kept,",
    ),
    "frozen product missing in dx": (
        "_add_branch(dy @ weight.to(wide), dlow",
        "_add_branch(0 * dy @ weight.to(wide), dlow",
    ),
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
