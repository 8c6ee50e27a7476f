"""`entrenar.data.batch`: batches cut by rows; positions survive JSON."""

import json

import pytest
import torch

from entrenar.data import Batch, LoaderState
from entrenar.errors import DataError

STATE = LoaderState(samples=7, drawn=(4, 3), epoch=1, fingerprint="abc")


def _batch(rows: int) -> Batch:
    inputs = torch.arange(rows * 3).reshape(rows, 3)
    targets = inputs + 1
    targets[0, 0] = -100
    return Batch(inputs, targets, tuple(((0, 1), (1, row + 2)) for row in range(rows)), 11)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9])
def test_parts_are_the_whole(rows: int):
    """Split parts have at most `rows` rows, and together give inputs, targets, documents and their count."""
    batch = _batch(5)
    parts = batch.split(rows)
    assert all(0 < len(part.input_ids) <= rows for part in parts)
    for name in ("input_ids", "targets"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert tuple(spans for part in parts for spans in part.documents) == batch.documents
    assert sum(part.num_targets for part in parts) == batch.num_targets == 14


def test_batches_without_documents_split_and_move():
    """None stays None; `to` keeps the bytes."""
    batch = Batch(torch.ones(2, 2, dtype=torch.long), torch.ones(2, 2, dtype=torch.long), None, 3)
    assert batch.split(1)[0].documents is None
    moved = batch.to("cpu")
    assert (moved.documents, moved.num_bytes) == (None, 3)
    assert _batch(2).to("cpu").documents == _batch(2).documents


def test_states_survive_json():
    """from_dict(to_dict) is the state, through JSON text."""
    assert LoaderState.from_dict(json.loads(json.dumps(STATE.to_dict()))) == STATE


@pytest.mark.parametrize(
    "change",
    [{"samples": 8}, {"samples": -7}, {"samples": 7.0}, {"drawn": [7, True]}, {"drawn": 3}, {"epoch": None}],
)
def test_unusable_states_are_refused(change: dict[str, object]):
    """Counts that are not whole or do not add up raise DataError."""
    with pytest.raises(DataError, match="loader state is not usable"):
        LoaderState.from_dict({**STATE.to_dict(), **change})


def test_a_state_without_a_field_is_refused():
    """The missing field is named."""
    with pytest.raises(DataError, match=r"loader state is not usable: KeyError.'fingerprint'"):
        LoaderState.from_dict({key: value for key, value in STATE.to_dict().items() if key != "fingerprint"})
