"""A model refuses ids that are not its own, before torch reads beyond a table."""

import pytest
import torch

from entrenar.errors import DataError
from entrenar.model import Llama, LlamaConfig


@pytest.fixture(scope="module")
def model():
    model = Llama(
        LlamaConfig(vocab_size=17, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8, max_seq_len=8)
    )
    model.init_weights(torch.Generator().manual_seed(0))
    return model


IDS = torch.tensor([[1, 2, 16]])


@pytest.mark.parametrize(
    ("ids", "targets", "message"),
    [
        (
            torch.tensor([[1, 17, 2]]),
            IDS,
            r"^token ids must be in \[0, 17\), got 17: the tokenizer's vocabulary must fit",
        ),
        (torch.tensor([[1, -1, 2]]), IDS, r"^token ids must be in \[0, 17\), got -1:"),
        (
            torch.tensor([1, 2, 3]),
            IDS,
            r"^token ids must be whole numbers in \(B, T\), got torch\.int64 of shape \(3,\)$",
        ),
        (IDS.float(), IDS, r"^token ids must be whole numbers in \(B, T\), got torch\.float32 of shape \(1, 3\)$"),
        (IDS[:, :0], IDS[:, :0], r"^token ids must be whole numbers in \(B, T\), got torch\.int64 of shape \(1, 0\)$"),
        (IDS, IDS[:, :2], r"^targets must have the shape \(1, 3\) of the token ids, got \(1, 2\)$"),
        (IDS, IDS.expand(2, 3), r"^targets must have the shape \(1, 3\) of the token ids, got \(2, 3\)$"),
    ],
)
def test_ids_of_another_kind_are_refused(model, ids, targets, message):
    """Range, shape and dtype are the model's, targets match: else the loss names what was given."""
    with pytest.raises(DataError, match=message):
        model.loss(ids, targets)


def test_the_forward_refuses_them_too(model):
    """Generation reads the same table."""
    with pytest.raises(DataError, match=r"^token ids must be in \[0, 17\), got 99"):
        model(torch.tensor([[99]]))


@pytest.mark.parametrize(
    "documents",
    [(((0, 1), (1, 2)),), (((0, 3),), ((0, 3),)), (((0, 1), (2, 3)),), (((1, 3),),), (((0, 2), (1, 3)),), ((),), ()],
)
def test_documents_must_cover_the_ids(model, documents):
    """Spans of another batch, with a gap, or that overlap are refused."""
    message = rf"^documents must cover each of the 1 rows of 3 tokens without a gap, got {len(documents)} rows, "
    with pytest.raises(DataError, match=message):
        model.loss(IDS, IDS, documents=documents)


def test_the_models_own_ids_pass(model):
    """First and last id, int32 and int64."""
    assert torch.isfinite(model.loss(IDS, IDS))
    assert torch.equal(model(IDS.int()), model(IDS))
