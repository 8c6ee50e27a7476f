"""The LoRA product draws its mask as it says, and does no work that nobody asked for."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from entrenar.ops.lora_linear import draw_kept, lora_linear


class Counted(TorchDispatchMode):
    """Counts products, and copies into another dtype of as many numbers as x has."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.products, self.wide_copies = size, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        out = function(*args, **(kwargs or {}))
        self.products += name in ("mm", "addmm", "addmm_", "bmm")
        self.wide_copies += name == "_to_copy" and out.numel() == self.size
        return out


def backward_costs(wanted: str) -> Counted:
    shapes = {"x": (5, 7), "weight": (3, 7), "lora_a": (2, 7), "lora_b": (3, 2)}
    inputs = {n: torch.ones(s, dtype=torch.bfloat16, requires_grad=n == wanted) for n, s in shapes.items()}
    y = lora_linear(**inputs, scale=0.5, compute_dtype=torch.float32)
    with Counted(35) as counted:
        y.backward(torch.ones_like(y))
    return counted


@pytest.mark.parametrize(
    ("wanted", "products", "copies"), [("x", 3, 1), ("weight", 1, 1), ("lora_a", 2, 1), ("lora_b", 1, 0)]
)
def test_a_gradient_costs_its_own_products(wanted, products, copies):
    """Equations (3) to (7) are computed where they are wanted; x is widened only where it is multiplied."""
    counted = backward_costs(wanted)
    assert counted.products == products
    assert counted.wide_copies == copies


def test_dropout_keeps_its_share():
    """The share of kept elements is the stated chance, within five deviations."""
    x = torch.empty(400, 1000)
    for dropout in (0.1, 0.5, 0.9):
        kept, chance = draw_kept(x, dropout, torch.Generator().manual_seed(0))
        assert chance == pytest.approx(1 - dropout, abs=1 / 65536)
        deviation = (chance * (1 - chance) / x.numel()) ** 0.5
        assert abs(float(kept.double().mean()) - chance) < 5 * deviation


def test_each_element_has_its_sixteen_bits():
    """An element is kept when its signed 16 bits lie below the chance, four elements to a draw, none left over."""
    x = torch.empty(101, 4001)
    mine, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    kept, chance = draw_kept(x, 0.25, mine)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None, generator=other)
    bits = draws.view(torch.int16)[: x.numel()].int()
    assert torch.equal(kept.flatten(), bits < round(chance * 65536) - 32768)
    assert (bits == round(chance * 65536) - 32768).any()  # where one off would show
    assert torch.equal(mine.get_state(), other.get_state())


@pytest.mark.parametrize(("dropout", "chances"), [(1e-9, 65535), (1 - 1e-9, 1)])
def test_the_least_and_the_most_dropout_still_are_dropout(dropout, chances):
    """A chance is never nought or one: dividing by it stays possible, and some are dropped."""
    assert draw_kept(torch.empty(8), dropout, None)[1] == chances / 65536
