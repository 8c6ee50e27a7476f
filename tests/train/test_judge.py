"""Ruin is told from a good state: by numbers that are not finite, and by a loss that a step has raised."""

import itertools
import math

import pytest
import torch
from train_toy import Toy, ToyBatch, toy_batches, toy_loss

from entrenar.train.judge import TrainedOn, fault_of_loss, fault_of_numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found(dtype: torch.dtype, value: float) -> None:
    """In any place of any tensor of floats; whole numbers and empty tensors are always finite."""
    tensors = {"a": torch.ones(3, 4, dtype=dtype), "codes": torch.ones(3, dtype=torch.uint8), "none": torch.ones(0)}
    assert fault_of_numbers(tensors) is None
    tensors["b"] = torch.ones(1000, dtype=dtype)
    tensors["b"][777] = value
    assert fault_of_numbers(tensors) == "1 of 4 tensors are not finite, b among them"


def test_no_tensors_have_no_fault() -> None:
    """A model without a trained weight is not judged."""
    assert fault_of_numbers({}) is None


@pytest.mark.parametrize(("factor", "is_wrecked"), [(1.0, False), (1.5, False), (1e3, True), (1e30, True)])
@pytest.mark.parametrize("rows", [None, 1])
def test_a_loss_that_a_step_has_raised_is_told(factor: float, rows: int | None, *, is_wrecked: bool) -> None:
    """Weights that are finite and far too large: the loss of the batch just seen says so; the module is as it was."""
    module = Toy()
    batches = [next(toy_batches())[0]]
    before = toy_loss(module.eval())(batches[0]).item() / batches[0].num_targets
    module.train()
    with torch.no_grad():
        module.down.weight.mul_(factor)
    fault = fault_of_loss(module, toy_loss(module), TrainedOn(batches, before), rows)
    assert (fault is not None) == is_wrecked
    assert fault is None or fault.startswith(
        f"the loss of the batch that was just trained on went from {before:.4g} to"
    )
    assert module.training


@pytest.mark.parametrize(
    ("before", "now", "is_wrecked"),
    [
        (1.0, 3.0, False), (1.0, 3.01, True), (0.1, 1.19, False), (0.1, 1.21, True), (5.0, 10.9, False),
        (5.0, 11.1, True), (5.0, math.nan, True), (math.inf, math.inf, True),
    ],
)  # fmt: skip
def test_the_bound_is_twice_the_loss_and_one_nat(before: float, now: float, *, is_wrecked: bool) -> None:
    """In means per target, over all batches."""
    batches = [batch for batch, _ in itertools.islice(toy_batches(), 3)]

    def loss(batch: ToyBatch) -> torch.Tensor:
        return torch.tensor(now * batch.num_targets, dtype=torch.float64)

    fault = fault_of_loss(Toy(), loss, TrainedOn(batches, before), None)
    assert (fault is not None) == is_wrecked


@pytest.mark.parametrize(("rows", "expected"), [(None, [4, 4]), (3, [3, 1, 3, 1])])
def test_a_batch_is_judged_in_pieces_that_fit_and_without_dropout(rows: int | None, expected: list[int]) -> None:
    """As many rows at once as the step had; the module is in evaluation mode meanwhile."""
    module, seen = Toy(), []

    def loss(batch: ToyBatch) -> torch.Tensor:
        assert not module.training
        seen.append(len(batch.x))
        return toy_loss(module)(batch)

    batches = [batch for batch, _ in itertools.islice(toy_batches(), 2)]
    assert fault_of_loss(module, loss, TrainedOn(batches, 2.0), rows) is None
    assert seen == expected


def test_what_cannot_be_computed_is_no_fault() -> None:
    """Without memory or without a target, finite weights stand."""
    batches = [next(toy_batches())[0]]

    def hungry(_: object) -> torch.Tensor:
        raise MemoryError

    assert fault_of_loss(Toy(), hungry, TrainedOn(batches, 1.0), None) is None
    batches[0].y.fill_(-100)
    assert fault_of_loss(Toy(), lambda _: torch.tensor(9.0), TrainedOn(batches, 1.0), None) is None
