"""Attention's gradients, in a form that mutants do not survive.

Expected output and gradients are float64 NumPy from the definition (`tests/ops/closed_forms.py`), for shapes without
two equal dimensions. Each named mutant changes one text of the operation's source; the comparison must see it.
"""

import importlib

import pytest

from .mutants import mutant
from .ops.closed_forms import TOLERANCE, attention_problems, caught_by, worst_error

NAME = "entrenar.ops.attention"
PROBLEMS = attention_problems()
MUTANTS: dict[str, tuple[str, str]] = {
    "scale missing in dq": ("dq = dscores @ k * scale", "dq = dscores @ k"),
    "scale missing in dk": ("dk = dscores.mT @ q * scale", "dk = dscores.mT @ q"),
    "scale missing in the fused backward": (
        "*inputs, logsumexp, 0.0, is_causal=True, scale=ctx.scale",
        "*inputs, logsumexp, 0.0, is_causal=True, scale=1.0",
    ),
    "scale missing in the fused forward": (
        "*inputs, is_causal=True, scale=scale",
        "*inputs, is_causal=True, scale=1.0",
    ),
    "transpose missing in dk": (
        "dk = dscores.mT @ q", "dk = dscores.reshape(*dscores.shape[:2], dscores.shape[3], -1) @ q"),
    "off by one in the mask": (".tril(num_keys - num_queries)", ".tril(num_keys - num_queries + 1)"),
    "off by one the other way": (".tril(num_keys - num_queries)", ".tril(num_keys - num_queries - 1)"),
    "off by one in the blocks' keys": (
        "end + num_keys - num_queries) for",
        "end + num_keys - num_queries - (start > 0)) for",
    ),
    "off by one in a document's start": (
        "(slice(row, row + 1), slice(None), slice(start, end))",
        "(slice(row, row + 1), slice(None), slice(max(0, start - 1), end))",
    ),
    "sign of the centering": ("(dprobabilities - (dout * out)", "(dprobabilities + (dout * out)"),
    "sign of the log-sum-exp": ("torch.log(total) + shift", "torch.log(total) - shift"),
    "mask dropped in the fused forward": (
        "*inputs, is_causal=True, scale=scale",
        "*inputs, is_causal=False, scale=scale",
    ),
    "mask dropped in the fused backward": (
        "0.0, is_causal=True, scale=ctx.scale",
        "0.0, is_causal=False, scale=ctx.scale",
    ),
    "mask dropped in the derived forward": (
        "hidden = hidden_keys(queries.shape[2], block, seen, k)\n            block_out",
        "hidden = hidden_keys(queries.shape[2], block, seen, k) & False\n            block_out",
    ),
    "document mask dropped": ("allowed = allowed & (documents", "allowed = allowed | (documents"),
    "documents dropped": ("scale, () if documents is None else documents.spans,", "scale, (),"),
    "axis of the centering": (
        "(dout * out).sum(-1, keepdim=True)",
        "(dout * out).sum(-2, keepdim=True).mean(-1, keepdim=True)",
    ),
    "axis of the heads": (
        "x.reshape(x.shape[0], groups, x.shape[1] // groups * x.shape[2], x.shape[3])",
        "x.transpose(1, 2).reshape(x.shape[0], groups, x.shape[1] // groups * x.shape[2], x.shape[3])",
    ),
    "values detached in the fused path": (
        "return apply(q, k, v, scale, () if",
        "return apply(q, k, v.detach(), scale, () if",
    ),
    "queries detached in the derived path": (
        "return apply(q, k, v, scale, block_size)",
        "return apply(q.detach(), k, v, scale, block_size)",
    ),
    "sum for the last block alone": ("dk[:, :, :seen] += block_dk", "dk[:, :, :seen] = block_dk"),
    "gradients in another order": (
        "grads = (dq, dk.to(k.dtype), dv.to(v.dtype))",
        "grads = (dq, dv.to(k.dtype), dk.to(v.dtype))",
    ),
    "cache not masked": ("if 1 < queries < keys else None", "if queries > keys else None"),
}  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_output_and_gradients_are_those_of_the_closed_form(problem, certificate):
    """The operation agrees with its definition to float64 rounding."""
    error = worst_error(problem, importlib.import_module(NAME))
    assert error < problem.rounding
    certificate.add("attention", "error", against="closed form", problem=problem.name, dtype="float64", relative=error)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name, certificate):
    """With one error planted an output or gradient is wrong."""
    assert caught_by(PROBLEMS, mutant(NAME, MUTANTS[name])), f"{name} survives a tolerance of {TOLERANCE}"
    certificate.add("attention", "controls", proof="closed form", planted=name)
