"""Evaluation gives the mean over all targets, however they are cut into batches."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from entrenar.errors import DataError
from entrenar.infer import Evaluation, evaluate
from entrenar.model import Llama, LlamaConfig

CONFIG = LlamaConfig(vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=40, max_seq_len=40)


@dataclass(frozen=True)
class Rows:
    input_ids: torch.Tensor
    targets: torch.Tensor
    documents: tuple[tuple[tuple[int, int], ...], ...] | None = None
    num_bytes: int | None = None


def model_of() -> Llama:
    model = Llama(CONFIG).double()
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.head_weight.mul_(50)
    return model


def rows_of(num_rows: int) -> Rows:
    """Rows with very different numbers of targets."""
    ids = torch.randint(61, (num_rows, 13), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].clone()
    for row in range(num_rows):
        targets[row, : 3 * row % 13] = -100
    return Rows(ids[:, :-1], targets, num_bytes=10 * num_rows)


def cut(rows: Rows, sizes: list[int]) -> list[Rows]:
    parts = zip(rows.input_ids.split(sizes), rows.targets.split(sizes), strict=True)
    return [Rows(ids, targets, num_bytes=10 * len(ids)) for ids, targets in parts]


@pytest.mark.parametrize("sizes", [[6], [1] * 6, [2, 4], [5, 1]])
def test_result_does_not_depend_on_the_batches(sizes: list[int]) -> None:
    """However the rows are cut, loss, perplexity and bits per byte are those of all targets at once."""
    model, rows = model_of(), rows_of(6)
    logits = model(rows.input_ids).flatten(0, 1).detach()
    expected = float(torch.nn.functional.cross_entropy(logits, rows.targets.flatten(), reduction="mean"))
    result = evaluate(model, cut(rows, sizes))
    num_targets = int((rows.targets != -100).sum())
    assert result.loss == pytest.approx(expected, rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-12)
    assert result.bits_per_byte == pytest.approx(expected * num_targets / math.log(2) / 60, rel=1e-12)
    assert (result.num_targets, result.num_bytes) == (num_targets, 60)


def test_packed_documents_do_not_see_each_other() -> None:
    """A packed row costs what its documents cost alone."""
    model, rows = model_of(), rows_of(1)
    packed = evaluate(model, [replace(rows, documents=(((0, 5), (5, 12)),))])
    alone = evaluate(model, [Rows(rows.input_ids[:, a:b], rows.targets[:, a:b]) for a, b in ((0, 5), (5, 12))])
    assert packed.loss == pytest.approx(alone.loss, rel=1e-12)
    assert packed.loss != pytest.approx(evaluate(model, [rows]).loss, rel=1e-6)


def test_bytes_that_are_not_known_give_no_bits_per_byte() -> None:
    """One batch without its bytes makes the figure absent, not wrong."""
    model, rows = model_of(), rows_of(4)
    known, unknown = cut(rows, [2, 2])
    result = evaluate(model, [known, replace(unknown, num_bytes=None)])
    assert (result.bits_per_byte, result.num_bytes) == (None, None)
    assert result.num_targets == int((rows.targets != -100).sum())


def test_nothing_to_predict_is_refused() -> None:
    """No target is an error, not a loss of 0."""
    rows = rows_of(2)
    masked = replace(rows, targets=torch.full_like(rows.targets, -100))
    with pytest.raises(DataError, match=r"at least one target, got none in 1 batches; the held-out text is empty"):
        evaluate(model_of(), [masked])


def test_hopeless_model_has_infinite_perplexity() -> None:
    """A loss beyond a float's exponent gives an infinite perplexity and keeps the loss."""
    model, rows = model_of(), rows_of(2)
    with torch.no_grad():
        model.head_weight.mul_(1e4)
    result = evaluate(model, [rows])
    assert result.loss > 1000
    assert result.perplexity == math.inf


def test_evaluation_leaves_no_gradient() -> None:
    """Weights are only read."""
    model = model_of()
    result = evaluate(model, [rows_of(2)])
    assert isinstance(result, Evaluation)
    assert all(weight.grad is None for weight in model.parameters())
