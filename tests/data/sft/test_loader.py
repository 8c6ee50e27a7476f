"""Batches of examples: complete, in an order that resumes anywhere, and with documents that never meet."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar.data.batch import IGNORED
from entrenar.data.sft.encode import Example
from entrenar.data.sft.loader import SftLoader, SftState, held_out_batches, make_batch
from entrenar.errors import ConfigError, DataError
from entrenar.model import Llama, LlamaConfig

BATCHINGS = ("packed", "grouped", "padded")


def example(number, length):
    """An example whose tokens are all its own number, the later half of them trained."""
    marks = np.arange(length + 1) > length // 2
    return Example(f"f:{number}", np.full(length + 1, number, dtype=np.int32), marks)


def some(count=37, seed=0):
    lengths = np.random.default_rng(seed).integers(1, 20, count)
    return [example(number, int(length)) for number, length in enumerate(lengths)]


def documents_of(batch):
    """Every real document as (its tokens, its targets)."""
    found = []
    for ids, targets, spans in zip(batch.input_ids, batch.targets, batch.documents, strict=True):
        for start, end in spans:
            here = slice(start, end)
            if (targets[here] != IGNORED).any():
                found.append((ids[here].tolist(), targets[here].tolist()))
    return found


@pytest.mark.parametrize("batching", BATCHINGS)
def test_an_epoch_is_every_example_once(batching):
    """In each epoch every example comes once, whole, as a document of its own, with its targets where they belong."""
    examples = some()
    loader = SftLoader(examples, batch_size=4, seq_len=24, seed=1, batching=batching)
    stream = iter(loader)
    orders = []
    for _ in range(2):
        batches = [next(stream)[0] for _ in range(loader.batches_per_epoch)]
        found = [one for batch in batches for one in documents_of(batch)]
        orders.append([ids[0] for ids, _ in found])
        assert sorted(orders[-1]) == list(range(len(examples)))
        for ids, targets in found:
            source = examples[ids[0]]
            assert ids == source.ids[:-1].tolist()
            assert targets == np.where(source.is_trained[1:], source.ids[1:], IGNORED).tolist()
        assert sum(batch.num_targets for batch in batches) == sum(int(e.is_trained[1:].sum()) for e in examples)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("batching", BATCHINGS)
def test_resuming_anywhere_goes_on_with_the_same_batches(batching):
    """From each saved state, through JSON, the rest is the same to the last element, across epochs."""
    examples = some()
    loader = SftLoader(examples, batch_size=4, seq_len=24, seed=1, batching=batching)
    stream = iter(loader)
    whole = [next(stream) for _ in range(2 * loader.batches_per_epoch + 1)]
    for number, (_, state) in enumerate(whole[:-1]):
        start = SftState.from_dict(state.to_dict())
        resumed = iter(SftLoader(examples, batch_size=4, seq_len=24, seed=1, batching=batching, start=start))
        batch, after = next(resumed)
        assert after == whole[number + 1][1]
        assert torch.equal(batch.input_ids, whole[number + 1][0].input_ids)
        assert torch.equal(batch.targets, whole[number + 1][0].targets)
        assert batch.documents == whole[number + 1][0].documents


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batching", BATCHINGS)
def test_ranks_share_one_global_batch(batching, world_size):
    """All ranks' documents are those of one rank, in order; states are equal; a rank without a row has no target."""
    examples = some(33)
    options = {"batch_size": 4, "seq_len": 24, "seed": 1, "batching": batching}
    alone = SftLoader(examples, **options)
    ranks = [iter(SftLoader(examples, **options, rank=rank, world_size=world_size)) for rank in range(world_size)]
    for _, (whole, after) in zip(range(2 * alone.batches_per_epoch), alone, strict=False):
        parts = [next(stream) for stream in ranks]
        assert {state for _, state in parts} == {after}
        assert [one for part, _ in parts for one in documents_of(part)] == documents_of(whole)
        assert sum(part.num_targets for part, _ in parts) == whole.num_targets


@pytest.mark.parametrize(("rank", "world_size"), [(0, 3), (2, 2), (-1, 2), (0, 0)])
def test_a_batch_that_ranks_cannot_share_is_refused(rank, world_size):
    """Batch size, world size and rank are named."""
    message = rf"^batch_size \(4, over .* world_size \({world_size}\), and rank \({rank}\)"
    with pytest.raises(ConfigError, match=message):
        SftLoader(some(3), batch_size=4, seq_len=24, seed=1, rank=rank, world_size=world_size)


def test_grouping_and_packing_save_padding():
    """Both read less padding than rows in file order; grouped batches hold neighbours in length."""
    examples = some(200)
    tokens = {}
    for batching in BATCHINGS:
        loader = SftLoader(examples, batch_size=8, seq_len=24, seed=1, batching=batching)
        stream = iter(loader)
        tokens[batching] = sum(next(stream)[0].input_ids.numel() for _ in range(loader.batches_per_epoch))
    real = sum(one.num_inputs for one in examples)
    assert tokens["packed"] < 1.1 * real
    assert tokens["grouped"] < 1.15 * real
    assert tokens["padded"] > 1.5 * real


@pytest.mark.property
@pytest.mark.kills("data.sft.loader", "edges if edges[-1] == length else [*edges, length]", "[0, length]")
@settings(max_examples=15)
@given(st.integers(0, 2**31 - 1))
def test_a_packed_example_has_the_logits_of_the_example_alone(seed):
    """Documents that share a row never see each other: logits are those of each document by itself."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24}
    model = Llama(LlamaConfig(**sizes, max_seq_len=64)).double()
    model.init_weights(generator)
    model.requires_grad_(requires_grad=False)
    rng = np.random.default_rng(seed)
    examples = [
        Example("", rng.integers(0, 50, length).astype(np.int32), np.ones(length, dtype=bool))
        for length in rng.integers(2, 20, 7)
    ]
    (batch,) = held_out_batches(examples, batch_size=99, seq_len=40)
    packed = model(batch.input_ids, documents=batch.documents)
    found = 0
    for row, spans in enumerate(batch.documents):
        for start, end in spans:
            here = slice(start, end)
            if (batch.targets[row][here] == IGNORED).all():
                continue
            alone = model(batch.input_ids[row][here][None])[0]
            torch.testing.assert_close(packed[row][here], alone, atol=1e-12, rtol=1e-12)
            found += 1
    assert found == len(examples)


def test_a_batch_is_as_long_as_its_longest_row():
    """Shorter rows are filled with a document of its own that has no target."""
    batch = make_batch([[example(1, 5), example(2, 2)], [example(3, 3)]])
    assert batch.input_ids.shape == (2, 7)
    assert batch.documents == (((0, 5), (5, 7)), ((0, 3), (3, 7)))
    assert (batch.targets[1, 3:] == IGNORED).all()


def test_a_position_in_other_data_is_refused():
    """Other rows, another seed, length, size or layout, or a damaged state cannot be resumed from."""
    examples = some()
    options = {"batch_size": 4, "seq_len": 24, "seed": 1, "batching": "packed"}
    _, state = next(iter(SftLoader(examples, **options)))
    changed = [(examples[1:], {}), (examples, {"seed": 2}), (examples, {"seq_len": 25}), (examples, {"batch_size": 5})]
    for rows, other in [*changed, (examples, {"batching": "grouped"})]:
        with pytest.raises(DataError, match="the saved position is in other data"):
            SftLoader(rows, **(options | other), start=state)
    for content in ({}, {"batches": -1, "fingerprint": "x"}, {"batches": 1, "fingerprint": None}):
        with pytest.raises(DataError, match="loader state is not usable"):
            SftState.from_dict(content)


def test_no_example_and_a_long_example_are_refused():
    """A loader needs examples that fit its rows."""
    with pytest.raises(DataError, match="a loader needs at least one example"):
        SftLoader([], batch_size=1, seq_len=8, seed=0)
    with pytest.raises(DataError, match="example 1 has 9 tokens, a row holds 8"):
        SftLoader([example(0, 3), example(1, 9)], batch_size=1, seq_len=8, seed=0, batching="padded")
