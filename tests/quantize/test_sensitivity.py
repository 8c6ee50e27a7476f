"""Estimated rises of the loss are those that rounding causes."""

import pytest
import torch
from torch import Tensor, nn

from entrenar import ops
from entrenar.ops.quantized.bits import WIDTHS
from entrenar.quantize.sensitivity import embedding_losses, head_losses, rounding_errors, watched_projections


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
