"""The gradients of the product with a weight in four bits, in a form that mutants do not survive.

Expected output and gradients are float64 NumPy from the definition (`tests/ops/closed_forms.py`), for shapes without
two equal dimensions. Each named mutant changes one text of the operation's source; the comparison must see it.
"""

import importlib

import pytest

from .mutants import mutant
from .ops.closed_forms import TOLERANCE, caught_by, nf4_linear_problems, worst_error

NAME = "entrenar.ops.quantized.linear"
PROBLEMS = nf4_linear_problems()
MUTANTS: dict[str, tuple[str, str]] = {
    "scale missing in the output": ("mT, alpha=plan.scale)", "mT)"),
    "scale missing in du": ("(dy @ lora_b.to(wide)).mul_(plan.scale)", "(dy @ lora_b.to(wide))"),
    "scale missing in dB": ("(low.mT @ dy).mul_(plan.scale)", "(low.mT @ dy)"),
    "dropout's chance missing": ("scale = scale / chance", "scale = scale"),
    "transpose missing in dA": (
        "dlora_a = (dlow.mT @ (rows if kept is None else rows * kept))",
        "dlora_a = ((rows if kept is None else rows * kept).mT @ dlow).reshape(lora_a.shape)",
    ),
    "transpose missing in dB": (
        "(low.mT @ dy).mul_(plan.scale).mT.to",
        "(low.mT @ dy).mul_(plan.scale).reshape(-1, 4).to",
    ),
    "off by one in the tile": ("dx.addmm_(dy[:, columns], tile)", "dx.addmm_(dy.roll(1, 1)[:, columns], tile)"),
    "off by one in the last tile": (
        "range(0, num_rows, size)", "range(0, num_rows - 1, size)"),
    "sign of the branch": ("branch = dlow @ lora_a.to(wide)", "branch = -dlow @ lora_a.to(wide)"),
    "mask missing in dx": ("branch if kept is None else branch.mul_(kept)", "branch"),
    "mask missing in dA": ("(rows if kept is None else rows * kept)).to(lora_a.dtype)", "rows).to(lora_a.dtype)"),
    "mask missing in the output": (
        "dropped = rows if kept is None else rows *",
        "dropped = rows if kept is None else rows + 0 *",
    ),
    "axis of the rows": (
        "dy = dy.reshape(-1, plan.shape[0]).to(wide)", "dy = dy.transpose(0, 1).reshape(-1, plan.shape[0]).to(wide)"),
    "adapter detached": ("return apply(x, lora_a, lora_b, kept,", "return apply(x, lora_a, lora_b.detach(), kept,"),
    "frozen product missing in dx": ("dx = _dx(dy, weight, plan)", "dx = 0 * _dx(dy, weight, plan)"),
    "other weights in the backward": (
        "*weight = ctx.saved_tensors\n",
        "*weight = ctx.saved_tensors\n        weight[0] = weight[0].flip(0)\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_output_and_gradients_are_those_of_the_closed_form(problem, certificate):
    """The operation agrees with its definition to float64 rounding."""
    error = worst_error(problem, importlib.import_module(NAME))
    assert error < problem.rounding
    certificate.add("nf4_linear", "error", against="closed form", problem=problem.name, dtype="float64", relative=error)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name, certificate):
    """With one error planted an output or gradient is wrong."""
    assert caught_by(PROBLEMS, mutant(NAME, MUTANTS[name])), f"{name} survives a tolerance of {TOLERANCE}"
    certificate.add("nf4_linear", "controls", proof="closed form", planted=name)
