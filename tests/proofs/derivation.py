"""Prove that a backward is the vector-Jacobian product of its forward, or return inputs where it is not."""

import time
from dataclasses import dataclass
from typing import Any

import sympy as sp

from .formulas import Formula
from .symbolic import Symbols, is_zero, variables


@dataclass(frozen=True)
class CounterExample:
    """An input's derivative, the numbers at which the backward misses it, and by how much."""

    partial: str
    numbers: dict[str, float]
    difference: float


@dataclass(frozen=True)
class Derivation:
    """The outcome: how many partial derivatives were compared, and the first that is wrong."""

    partials: int
    shifts: int
    seconds: float
    refuted: CounterExample | None = None


def counter_example(symbols: Symbols, partial: str, difference: Any) -> CounterExample:
    """Find numbers at which an expression that is not zero everywhere is not zero."""
    numbers: dict[sp.Symbol, Any] = {}
    value = symbols.value(difference, numbers)
    inputs = {str(s): float(n) for s, n in numbers.items() if s not in symbols.meaning}
    assert abs(value) > 1e-9, f"{partial}: {difference} is not the zero function, but is zero at {inputs}"
    return CounterExample(partial, inputs, float(value))


def derive(symbols: Symbols, formula: Formula) -> Derivation:
    """Compare backward(dy) with the derivatives of dy · y by every entry of every input.

    Also compares y with its definition, and shows that no softmax shift that y was computed with has an influence.
    """
    started, y, inputs = time.process_time(), formula.y, formula.inputs
    dy = variables(symbols, "dy", *y.shape)
    loss = sum((a * b for a, b in zip(dy.array.ravel(), y.array.ravel(), strict=True)), sp.Integer(0))
    gradients = formula.backward(dy)
    count = 0
    for place, (got, want) in enumerate(zip(y.array.ravel(), formula.definition.array.ravel(), strict=True)):
        if not is_zero(got - want):
            example = counter_example(symbols, f"output {place}", got - want)
            return Derivation(0, len(symbols.shifts), time.process_time() - started, example)
    for x, gradient in zip(inputs, gradients, strict=True):
        assert gradient.shape == x.shape, f"a gradient has the shape {gradient.shape}, its input {x.shape}"
        entries = list(x.array.ravel())
        expected = symbols.gradient(loss, entries)
        for name, want, got in zip(entries, expected, gradient.array.ravel(), strict=True):
            if not is_zero(want - got):
                example = counter_example(symbols, str(name), want - got)
                return Derivation(count, len(symbols.shifts), time.process_time() - started, example)
            count += 1
    shifts = [shift for shift in symbols.shifts if any(entry.has(shift) for entry in y.array.ravel())]
    assert all(is_zero(slope) for slope in symbols.gradient(loss, shifts)), "a softmax shift has an influence"
    return Derivation(count, len(symbols.shifts), time.process_time() - started)
