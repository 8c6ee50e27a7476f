"""A budget is spent where a byte lowers the loss most, on estimates that agree with what rounding does."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from entrenar import ops
from entrenar.errors import ConfigError
from entrenar.ops.quantized.bits import WIDTHS
from entrenar.peft.bit_budget import (
    Cost,
    InputMoments,
    allocate,
    embedding_losses,
    head_losses,
    rounding_errors,
    watched_projections,
)


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


def net() -> tuple[nn.Linear, Tensor, Tensor]:
    """A projection whose outputs are logits, its inputs, and targets drawn from its own probabilities."""
    generator = torch.Generator().manual_seed(0)
    projection = nn.Linear(64, 11, bias=False)
    with torch.no_grad():
        projection.weight.copy_(torch.randn(11, 64, generator=generator) / 4)
    x = torch.randn(6000, 64, generator=generator)
    targets = torch.multinomial(torch.softmax(projection(x).detach(), -1), 1, generator=generator)[:, 0]
    return projection.requires_grad_(requires_grad=False), x, targets


def true_rise(weight: Tensor, error: Tensor, x: Tensor) -> float:
    """The rise of the expected loss under the model's own probabilities: KL, token by token."""
    before, after = (torch.log_softmax(x @ w.mT, -1) for w in (weight, weight + error))
    return float((before.exp() * (before - after)).sum())


def test_estimated_rises_are_those_of_the_loss():
    """For a projection and for a head, the estimate is within a tenth of the measured rise, from 3 bits on."""
    projection, x, targets = net()
    losses: dict[str, dict[int, float]] = {"p": {}}
    with watched_projections({"p": projection}, losses):
        logits = projection(x.requires_grad_())
        nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
    of_head = head_losses(projection.weight, x)
    for bits, error in rounding_errors(projection.weight):
        rise = true_rise(projection.weight, error, x.detach())
        if bits >= 3:
            assert of_head[bits] == pytest.approx(rise, rel=0.1)
            assert losses["p"][bits] == pytest.approx(rise, rel=0.1)
    projection(x)  # no longer watched: nothing is added at this backward
    seen = dict(losses["p"])
    nn.functional.cross_entropy(projection(x), targets).backward()
    assert losses["p"] == seen


def test_an_embedding_s_rise_counts_the_rows_that_are_looked_up():
    """It is half the squared product of a row's error with the gradient there; other rows cost nothing."""
    weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    ids, dx = torch.tensor([3, 3, 7]), torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    losses = embedding_losses(weight, ids, dx)
    for bits, error in rounding_errors(weight):
        by_hand = sum(0.5 * float(error[token] @ gradient) ** 2 for token, gradient in zip(ids, dx, strict=True))
        assert losses[bits] == pytest.approx(by_hand, rel=1e-4)


def test_rounding_errors_are_those_of_each_width():
    """Every width comes with what its rounding changes."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    errors = dict(rounding_errors(weight))
    assert tuple(errors) == WIDTHS
    draft = ops.dequantize_nf_bits(ops.quantize_nf_bits(weight, 4, is_draft=True))
    assert torch.equal(errors[4], draft - weight)


def test_moments_are_summed_over_calls_until_closed():
    """xᵀx of all rows of all inputs, none after close."""
    module = nn.Linear(5, 3)
    moments = InputMoments({"m": module})
    first, second = torch.randn(2, 4, 5), torch.randn(1, 7, 5)
    module(first)
    module(second)
    moments.close()
    module(first)
    rows = torch.cat([first.flatten(0, 1), second.flatten(0, 1)])
    torch.testing.assert_close(moments.sums["m"], rows.mT @ rows)
