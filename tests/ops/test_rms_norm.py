"""RMS normalization: its defining properties, and the blocks it runs in."""

import pytest
import torch

from entrenar.ops import rms_norm
from entrenar.ops.rms_norm import reference_rms_norm
from entrenar.ops.row_blocks import BLOCK_ELEMENTS


def test_rows_have_root_mean_square_one(generator):
    """With weight 1 and eps 0 every row of the output has mean square 1."""
    x = torch.randn(7, 64, generator=generator, dtype=torch.float64) * 5
    y = rms_norm(x, torch.ones(64, dtype=torch.float64), 0.0)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(7, dtype=torch.float64), rtol=1e-14, atol=0)


def test_scaling_by_a_power_of_two_changes_no_bit(generator):
    """With eps 0 the norm forgets the scale of its input exactly."""
    x, weight = torch.randn(5, 32, generator=generator), torch.randn(32, generator=generator)
    assert torch.equal(rms_norm(x * 1024, weight, 0.0), rms_norm(x, weight, 0.0))


def test_many_blocks_equal_the_whole(generator):
    """Rows that fill several blocks and a part of one give the reference's output and gradients."""
    width = 512
    rows = 5 * BLOCK_ELEMENTS // (2 * width) + 1
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(width, generator=generator, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    y, want = rms_norm(x, weight, 1e-5), reference_rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    pairs = zip(torch.autograd.grad(y, (x, weight), dy), torch.autograd.grad(want, (x, weight), dy), strict=True)
    for got, grad in pairs:
        torch.testing.assert_close(got, grad, rtol=1e-11, atol=1e-11)


def test_large_float16_values_do_not_overflow():
    """The mean square is taken in float32, where the square of a large half-precision value still fits."""
    x = torch.full((1, 8), 60000.0, dtype=torch.float16)
    y = rms_norm(x, torch.ones(8, dtype=torch.float16), 1e-5)
    assert torch.equal(y, torch.ones(1, 8, dtype=torch.float16))


@pytest.mark.parametrize("eps", [1e-6, 1.0])
def test_eps_is_added_to_the_mean_square(eps):
    """A row of zeros stays zero and a row of ones shrinks by exactly what eps adds."""
    x = torch.stack((torch.zeros(4), torch.ones(4))).double()
    y = rms_norm(x, torch.ones(4, dtype=torch.float64), eps)
    torch.testing.assert_close(y[1], torch.full((4,), (1 + eps) ** -0.5, dtype=torch.float64), rtol=1e-15, atol=0)
    assert torch.equal(y[0], torch.zeros(4, dtype=torch.float64))
