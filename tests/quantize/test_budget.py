"""A budget is spent where a byte lowers the loss most."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar.errors import ConfigError
from entrenar.ops.quantized.bits import WIDTHS
from entrenar.quantize.budget import Cost, allocate


def convex(scale: float, numbers: int) -> dict[int, Cost]:
    """A matrix whose loss falls fourfold with each bit, as rounding's does."""
    return {bits: Cost(bits * numbers, scale * 4.0**-bits) for bits in WIDTHS}


def test_equal_matrices_share_a_budget_equally():
    """Of what is left over after whole widths for all, no byte is spent that buys none."""
    costs = {name: convex(1.0, 10) for name in "abc"}
    assert allocate(costs, 3 * 40) == {"a": 4, "b": 4, "c": 4}
    assert sorted(allocate(costs, 3 * 40 + 19).values()) == [4, 4, 5]


def test_a_sensitive_matrix_is_given_more():
    """What costs sixteen times as much gets two bits more."""
    assert allocate({"dull": convex(1.0, 10), "fine": convex(16.0, 10)}, 80) == {"dull": 3, "fine": 5}


def test_a_step_that_buys_nothing_is_passed_over_for_a_larger_one():
    """From 2 bits to 4 at once, where 3 would be worse than 2."""
    bumpy = {2: Cost(20, 1.0), 3: Cost(30, 1.5), 4: Cost(40, 0.1)}
    assert allocate({"bumpy": bumpy}, 45) == {"bumpy": 4}
    assert allocate({"bumpy": bumpy}, 35) == {"bumpy": 2}


@settings(max_examples=60, deadline=None)
@given(
    scales=st.lists(st.floats(0.01, 100), min_size=2, max_size=3),
    sizes=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    budget_bits=st.floats(2, 8.5),
)
def test_a_budget_is_met_and_nearly_as_well_spent_as_can_be(scales, sizes, budget_bits):
    """No choice of widths at all within the budget is better than what the greedy one would be with one step more."""
    costs = {str(i): convex(scale, sizes[i]) for i, scale in enumerate(scales)}
    total = sum(sizes[: len(scales)])
    widths = allocate(costs, budget_bits * total)
    assert sum(costs[name][bits].size_bytes for name, bits in widths.items()) <= budget_bits * total
    found = sum(costs[name][bits].loss for name, bits in widths.items())
    slack = max(costs[name][bits].loss for name, bits in widths.items())
    for choice in itertools.product(WIDTHS, repeat=len(costs)):
        picked = [cost[bits] for cost, bits in zip(costs.values(), choice, strict=True)]
        if sum(cost.size_bytes for cost in picked) <= budget_bits * total:
            assert found - slack <= sum(cost.loss for cost in picked)


def test_a_budget_below_the_least_widths_is_refused():
    """The message says what the least widths take."""
    with pytest.raises(ConfigError, match="take 20 bytes at the least widths, 19 are allowed"):
        allocate({"a": convex(1.0, 10)}, 19)
