"""Run plain Python functions of the product on Z3's numbers, one path after the other.

A comparison of symbolic numbers has no truth value until the solver gives it one: `paths` runs a function once for
each way its comparisons can turn out together, and returns each way's condition and result. Then a claim about the
result is a question to the solver, answered for all numbers at once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import z3


@dataclass(frozen=True)
class Path:
    """One way through a function."""

    condition: list[Any]
    result: Any


@contextmanager
def branching(decide: Callable[[Any], bool]) -> Iterator[None]:
    """Let `decide` answer where Python asks a symbolic comparison for its truth."""
    own = z3.BoolRef.__bool__
    z3.BoolRef.__bool__ = decide  # type: ignore[method-assign]
    try:
        yield
    finally:
        z3.BoolRef.__bool__ = own  # type: ignore[method-assign]


def paths(function: Callable[[], Any], premises: list[Any]) -> list[Path]:
    """Return every way through `function` that the premises allow; the ways cover all of them."""
    found, waiting = [], [()]
    while waiting:
        prefix = waiting.pop()
        taken: list[bool] = []
        condition: list[Any] = []

        def decide(question: Any, prefix: tuple[bool, ...] = prefix, taken=taken, condition=condition) -> bool:
            question = z3.simplify(question)
            if z3.is_true(question) or z3.is_false(question):
                return z3.is_true(question)
            place = len(taken)
            if place < len(prefix):
                answer = prefix[place]
            else:
                answer = satisfiable([*premises, *condition, question])
                if answer and satisfiable([*premises, *condition, z3.Not(question)]):
                    waiting.append((*taken, False))
            taken.append(answer)
            condition.append(question if answer else z3.Not(question))
            return answer

        with branching(decide):
            result = function()
        found.append(Path(condition, result))
    return found


def satisfiable(claims: list[Any]) -> bool:
    solver = z3.Solver()
    solver.set("timeout", 20_000)
    solver.add(*claims)
    answer = solver.check()
    assert answer != z3.unknown, f"undecided: {solver.reason_unknown()}"
    return answer == z3.sat


def counter_example(claim: Any, premises: list[Any]) -> str | None:
    """Return numbers that fulfill the premises and not the claim, or None: the claim is proved.

    The premises are checked to be fulfillable, so that nothing is proved of nothing.
    """
    assert satisfiable(premises), f"vacuous: nothing fulfills {premises}"
    solver = z3.Solver()
    solver.set("timeout", 20_000)
    solver.add(*premises, z3.Not(claim))
    answer = solver.check()
    assert answer != z3.unknown, f"undecided: {solver.reason_unknown()}"
    return str(solver.model()) if answer == z3.sat else None
