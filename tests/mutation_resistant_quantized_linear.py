"""The gradients of the product with a quantized weight, in a form that mutants do not survive.

Expected output and gradients are float64 NumPy from the definition (`tests/ops/closed_forms.py`), for shapes without
two equal dimensions. Each named mutant changes one text of the operation's source; the comparison must see it.
"""

import importlib

import pytest

from .mutants import mutant
from .ops.closed_forms import TOLERANCE, caught_by, quantized_linear_problems, worst_error

NAME = "entrenar.ops.quantized.linear"
PROBLEMS = quantized_linear_problems()
MUTANTS: dict[str, tuple[str, str]] = {
    "scale missing in the output": ("low, lora_b.to(wide), plan.scale)", "low, lora_b.to(wide), 1)"),
    "scale missing in du": ("(dy, lora_b.to(wide), plan.scale)", "(dy, lora_b.to(wide), 1)"),
    "scale missing in dB": ("lora_b_gradient(dy, low, plan.scale)", "lora_b_gradient(dy, low, 1)"),
    "dropout's chance missing": ("scale = scale / chance", "scale = scale"),
    "transpose missing in dA": (
        "lora_a_gradient(dlow, rows, kept).to", "lora_a_gradient(dlow, rows, kept).mT.reshape(lora_a.shape).to"),
    "transpose missing in dB": (
        "lora_b_gradient(dy, low, plan.scale).to",
        "lora_b_gradient(dy, low, plan.scale).mT.reshape(lora_b.shape).to",
    ),
    "off by one in the tile": ("dx.addmm_(dy[:, columns], tile)", "dx.addmm_(dy.roll(1, 1)[:, columns], tile)"),
    "off by one in the last tile": (
        "range(0, num_rows, size)", "range(0, num_rows - 1, size)"),
    "sign of the branch": ("add_branch_gradient(dx, dlow,", "add_branch_gradient(dx, -dlow,"),
    "mask missing in dx": ("lora_a.to(wide), kept)\n            dx", "lora_a.to(wide), None)\n            dx"),
    "mask missing in dA": ("lora_a_gradient(dlow, rows, kept)", "lora_a_gradient(dlow, rows, None)"),
    "mask missing in the output": ("None if kept is None else kept.reshape(rows.shape))", "None)"),
    "axis of the rows": (
        "dy = dy.reshape(-1, plan.shape[0]).to(wide)", "dy = dy.transpose(0, 1).reshape(-1, plan.shape[0]).to(wide)"),
    "adapter detached": ("return apply(x, lora_a, lora_b, kept,", "return apply(x, lora_a, lora_b.detach(), kept,"),
    "frozen product missing in dx": ("dx = frozen_input_gradient(dy,", "dx = 0 * frozen_input_gradient(dy,"),
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
    certificate.add(
        "quantized_linear", "error", against="closed form", problem=problem.name, dtype="float64", relative=error
    )


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name, certificate):
    """With one error planted an output or gradient is wrong."""
    assert caught_by(PROBLEMS, mutant(NAME, MUTANTS[name])), f"{name} survives a tolerance of {TOLERANCE}"
    certificate.add("quantized_linear", "controls", proof="closed form", planted=name)
