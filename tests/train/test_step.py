"""A global batch has one gradient, however it is cut, and running out of memory only cuts it finer."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from train_toy import CLASSES, WIDTH, Toy, ToyBatch, toy_loss

from entrenar.errors import OutOfMemoryError
from entrenar.train.precision import GradientSums
from entrenar.train.step import RowLimit, StepGradient
from entrenar.train.world import World

ROWS = 24


def _global_batch(dtype: torch.dtype = torch.float64) -> ToyBatch:
    generator = torch.Generator().manual_seed(5)
    targets = torch.randint(0, CLASSES, (ROWS,), generator=generator)
    targets[::5] = -100
    return ToyBatch(torch.randn(ROWS, WIDTH, generator=generator).to(dtype), targets)


def _gradients(
    module: Toy,
    batches: list[ToyBatch],
    loss: Callable[[ToyBatch], Tensor] | None = None,
    limit: RowLimit | None = None,
    on_split: Callable[[str], None] = lambda _: None,
) -> tuple[list[Tensor], float]:
    sums = GradientSums(module.parameters())
    gradient = StepGradient(
        loss or toy_loss(module), sums, limit or RowLimit(), World.alone(), lambda _: nullcontext(), on_split
    )
    summed_loss, totals = gradient.take(batches)
    assert totals["targets"] == sum(batch.num_targets for batch in batches)
    return [gradient.clone() for gradient in sums.all()], summed_loss.item()


@pytest.mark.property
@pytest.mark.kills(
    "train.step",
    "[piece for batch in batches for piece in batch.split(self.rows)]",
    "[batch.split(self.rows)[0] for batch in batches]",
)
@settings(deadline=None)
@given(st.lists(st.integers(1, ROWS - 1), unique=True, max_size=6), st.sampled_from([None, 1, 2, 5]))
def test_any_cut_gives_the_same_gradient(cuts: list[int], rows: int | None) -> None:
    """In float64, one batch and any partition of it, with any row limit, agree to 1e-12 in loss and gradient."""
    module, whole = Toy(dropout=0.0, dtype=torch.float64), _global_batch()
    sizes = [b - a for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), ROWS], strict=True)]
    pieces = [ToyBatch(x, y) for x, y in zip(whole.x.split(sizes), whole.y.split(sizes), strict=True)]
    expected, expected_loss = _gradients(module, [whole])
    actual, actual_loss = _gradients(module, pieces, limit=RowLimit(rows))
    assert actual_loss == pytest.approx(expected_loss, rel=1e-12)
    for one, other in zip(actual, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-13)


def test_a_mean_of_means_would_be_noticed() -> None:
    """Negative control: averaging each piece over its own targets gives another gradient for unequal pieces."""
    module, whole = Toy(dropout=0.0, dtype=torch.float64), _global_batch()
    pieces = [ToyBatch(whole.x[:4], whole.y[:4]), ToyBatch(whole.x[4:], whole.y[4:])]
    loss = toy_loss(module)
    expected, _ = _gradients(module, [whole])
    wrong, _ = _gradients(module, pieces, loss=lambda b: loss(b) / b.num_targets * whole.num_targets / 2)
    assert not torch.allclose(wrong[0], expected[0], rtol=1e-3)


def test_bfloat16_pieces_are_summed_in_float32() -> None:
    """The gradient of 24 bfloat16 pieces lies in float32 sums, as near to the float64 gradient as their parts are."""
    module = Toy(dropout=0.0, dtype=torch.bfloat16)
    reference = Toy(dropout=0.0, dtype=torch.float64)
    reference.load_state_dict(module.state_dict())
    exact, _ = _gradients(reference, [_global_batch()])
    actual, _ = _gradients(module, _global_batch(torch.float32).split(1))
    for one, other in zip(actual, exact, strict=True):
        assert one.dtype == torch.float32
        assert (one.double() - other).norm() <= 2.0**-7 * other.norm()


def _hungry(loss: Callable[[ToyBatch], Tensor], rows: int, where: str) -> Callable[[ToyBatch], Tensor]:
    """Return `loss` on a machine that has memory for `rows` rows: it draws from the generators, then fails."""

    def run(batch: ToyBatch) -> Tensor:
        result = loss(batch)
        if len(batch.y) <= rows:
            return result
        if where == "forward":
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory\nmore")
        result.register_hook(lambda _: (_ for _ in ()).throw(MemoryError("std::bad_alloc")))
        return result

    return run


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_halves_the_pieces_and_keeps_the_gradient(where: str) -> None:
    """Three rows fit: 24 are halved to 12, 6 and 3, each time told, and loss and gradient are the same as before."""
    module, whole = Toy(dropout=0.0, dtype=torch.float64), _global_batch()
    expected, expected_loss = _gradients(module, [whole])
    told: list[str] = []
    limit = RowLimit()
    actual, loss = _gradients(module, [whole], _hungry(toy_loss(module), 3, where), limit, told.append)
    assert limit.rows == 3
    assert [message.split("with ")[1] for message in told] == [f"{n} rows at a time" for n in (12, 6, 3)]
    assert "more" not in told[0]
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for one, other in zip(actual, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-13)


def test_after_a_split_the_random_state_is_as_if_it_had_been_cut_from_the_start() -> None:
    """With dropout, a step that failed twice equals bit for bit one that began with the smaller pieces."""
    module, whole = Toy(dropout=0.5), _global_batch(torch.float32)
    torch.manual_seed(11)
    expected, _ = _gradients(module, [whole], limit=RowLimit(6))
    after = torch.rand(1)
    torch.manual_seed(11)
    actual, _ = _gradients(module, [whole], _hungry(toy_loss(module), 6, "backward"))
    assert torch.equal(torch.rand(1), after)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


def test_one_row_too_much_is_an_error_that_says_what_to_change() -> None:
    """When a single row does not fit, the error names the cause and the settings that help."""
    module = Toy()
    with pytest.raises(
        OutOfMemoryError, match=r"single row \(std::bad_alloc\); shorten seq_len, set checkpointing = full"
    ):
        _gradients(module, [_global_batch(torch.float32)], _hungry(toy_loss(module), 0, "backward"))


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    """A programming error comes through unchanged and is not retried."""
    calls = []

    def broken(batch: ToyBatch) -> Tensor:
        calls.append(batch)
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        _gradients(Toy(), [_global_batch()], broken)
    assert len(calls) == 1
