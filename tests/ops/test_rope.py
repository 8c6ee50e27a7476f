"""Rotary positions: rotations that know only distances."""

import pytest
import torch

from entrenar.ops import rope
from entrenar.ops.rope import reference_rope
from entrenar.ops.row_blocks import BLOCK_ELEMENTS


def table(positions: torch.Tensor, half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin of shape (1, T, half) with distinct frequencies."""
    angles = positions.double()[None, :, None] * 10 ** -torch.arange(half).double()
    return angles.cos(), angles.sin()


@pytest.fixture
def heads(generator) -> torch.Tensor:
    return torch.randn(2, 3, 5, 8, generator=generator, dtype=torch.float64)


def test_position_zero_changes_no_bit(heads):
    """A rotation by zero is the identity, exactly."""
    assert torch.equal(rope(heads, *table(torch.zeros(5), 4)), heads)


def test_length_is_kept_and_the_inverse_returns(heads):
    """Every head keeps its length, and rotating back by the same angles restores it."""
    cos, sin = table(torch.arange(5), 4)
    y = rope(heads, cos, sin)
    torch.testing.assert_close(y.norm(dim=-1), heads.norm(dim=-1), rtol=1e-14, atol=0)
    torch.testing.assert_close(rope(y, cos, -sin), heads, rtol=1e-13, atol=1e-14)
    assert not torch.allclose(y[:, :, 1:], heads[:, :, 1:])


def test_products_depend_on_distance_alone(heads, generator):
    """Shifting both positions by the same amount leaves every query-key product as it was."""
    keys = torch.randn(heads.shape, generator=generator, dtype=torch.float64)
    near, far = table(torch.arange(5), 4), table(torch.arange(5) + 100, 4)
    products = [rope(heads, *t) @ rope(keys, *t).mT for t in (near, far)]
    torch.testing.assert_close(products[0], products[1], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(products[0], rope(heads, *far) @ rope(keys, *far).mT, rtol=1e-11, atol=1e-11)


def test_halves_are_the_planes():
    """A quarter turn of plane 0 moves coordinate 0 into coordinate K/2, as in Hugging Face's layout."""
    x = torch.zeros(1, 1, 1, 6)
    x[..., 0] = 1
    y = rope(x, torch.tensor([[[0.0, 1.0, 1.0]]]), torch.tensor([[[1.0, 0.0, 0.0]]]))
    assert y.flatten().tolist() == [0, 0, 0, 1, 0, 0]


def test_each_row_can_have_its_own_angles(heads):
    """Tables with a batch dimension rotate each row by its own positions, forward and backward."""
    tables = [table(torch.arange(5) * (row + 1), 4) for row in range(2)]
    cos, sin = (torch.cat(parts) for parts in zip(*tables, strict=True))
    x = heads.clone().requires_grad_()
    y = rope(x, cos, sin)
    for row, (row_cos, row_sin) in enumerate(tables):
        assert torch.equal(y[row : row + 1], rope(heads[row : row + 1], row_cos, row_sin))
    (dx,) = torch.autograd.grad(y, x, heads)
    assert torch.equal(dx, rope(heads, cos, -sin))


@pytest.mark.parametrize(("batch", "time"), [(3, BLOCK_ELEMENTS // 24), (BLOCK_ELEMENTS // 40, 2)])
def test_many_blocks_equal_the_whole(batch, time, generator):
    """Rows and tokens that fill several blocks and a part of one give the reference's result."""
    x = torch.randn(batch, 2, time, 8, generator=generator)
    cos, sin = (t.float() for t in table(torch.arange(time), 4))
    torch.testing.assert_close(rope(x, cos, sin), reference_rope(x, cos, sin), rtol=1e-6, atol=1e-6)


def test_memory_layout_is_kept(generator):
    """Heads that are strided over tokens stay so: attention reads them as the projection wrote them."""
    x = torch.randn(2, 5, 3, 8, generator=generator).transpose(1, 2)
    assert rope(x, *(t.float() for t in table(torch.arange(5), 4))).stride() == x.stride()
