"""A model is rounded to its budget, and a budget that cannot be met is refused with the least that can."""

import pytest
import torch

from entrenar.errors import ConfigError, DataError
from entrenar.peft import quantized_weights
from entrenar.quantize import quantize_to_budget


@pytest.fixture
def rows():
    return torch.randint(0, 300, (8, 33), generator=torch.Generator().manual_seed(2))


def silent(_: str) -> None:
    pass


@pytest.mark.parametrize("bits", [3.0, 5.0])
def test_more_bits_raise_the_loss_less(model, rows, bits):
    """The estimate falls with the budget, and no budget is left unused by more than the smallest step."""
    budget = quantize_to_budget(model, rows, bits, silent)
    assert {weight.bits for weight in quantized_weights(model).values()} == set(budget.widths.values())
    assert bits - 0.2 < budget.bits <= bits
    assert budget.expected_rise < (0.05 if bits == 5.0 else 1.0)
    assert budget.lines()[0].startswith(f"budget        {budget.bits:.3f} bits a weight")


def test_an_unreachable_budget_says_the_least_possible(model, rows):
    """The figure in the message is one that can be met."""
    with pytest.raises(ConfigError, match=r"--bits must be >= 2\.\d+ for this model, got 2\b") as raised:
        quantize_to_budget(model, rows, 2.0, silent)
    least = float(str(raised.value).split(">= ")[1].split()[0])
    assert quantize_to_budget(model, rows, least, silent).bits <= least
    assert {weight.bits for weight in quantized_weights(model).values()} == {2}


def test_a_weight_that_is_not_finite_is_named(model, rows):
    """Before any matrix is rounded."""
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    with pytest.raises(DataError, match=r"^model.layers.1.mlp.up_proj.weight must be finite to be quantized, got NaN"):
        quantize_to_budget(model, rows, 4.2, silent)
    assert not quantized_weights(model)
