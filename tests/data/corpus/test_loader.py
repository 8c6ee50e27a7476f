"""`data.corpus.loader`: every window once an epoch, resumed exactly, the same batch for any number of ranks."""

import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entrenar.data import (
    Batch,
    Corpus,
    Loader,
    LoaderState,
    PrepareConfig,
    Tokenizer,
    prepare,
    train_bpe,
    validation_batches,
)
from entrenar.errors import ConfigError, DataError
from entrenar.ops import document_spans

STORIES = [f"story {number} of the cat {'that sat ' * (number % 5)}" for number in range(40)]
QUICK = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)


@pytest.fixture(scope="session")
def corpora(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> list[Corpus]:
    return prepared(tmp_path_factory.mktemp("corpora"), tokenizer, (40, 15), val_fraction=0.2)


@pytest.fixture(scope="session")
def small_corpora(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> list[Corpus]:
    return prepared(tmp_path_factory.mktemp("small"), tokenizer, (7, 4), val_fraction=0)


def prepared(folder: Path, tokenizer: Tokenizer, counts: tuple[int, int], *, val_fraction: float) -> list[Corpus]:
    for name, count, end in zip("ab", counts, ("", " again"), strict=True):
        stories = [story + end for story in STORIES[:count]]
        (folder / f"{name}.txt").write_text("\n###\n".join(stories))
        config = PrepareConfig(document_separator="###", val_fraction=val_fraction, shard_tokens=100)
        prepare([folder / f"{name}.txt"], folder / name, config, tokenizer=tokenizer)
    return [Corpus.open(folder / name) for name in ("a", "b")]


def take(loader: Loader, count: int) -> list[tuple[Batch, LoaderState]]:
    return list(itertools.islice(loader, count))


def rows_of(batches: list[tuple[Batch, LoaderState]]) -> list[tuple[int, ...]]:
    return [tuple(row) for batch, _ in batches for row in batch.input_ids.tolist()]


def same(first: Batch, second: Batch) -> bool:
    tensors = torch.equal(first.input_ids, second.input_ids) and torch.equal(first.targets, second.targets)
    return tensors and (first.documents, first.num_bytes) == (second.documents, second.num_bytes)


@pytest.mark.property
@pytest.mark.kills(
    "data.corpus.loader",
    "permute(places[here], count, keys)",
    "permute(places[here] // np.uint64(2), count, keys)",
)
@QUICK
@given(seq_len=st.integers(1, 30), batch_size=st.integers(1, 7), seed=st.integers(0, 5))
def test_every_window_comes_once_an_epoch(small_corpora: list[Corpus], seq_len: int, batch_size: int, seed: int):
    """Of each corpus, all windows of the sequence come exactly once in each of two epochs."""
    loader = Loader(*small_corpora, batch_size=batch_size, seq_len=seq_len, seed=seed)
    expected: Counter[tuple[int, ...]] = Counter()
    for corpus in small_corpora:
        stream = corpus.stream("train")
        whole = stream.read(0, len(stream)).tolist()
        count = (len(whole) - 1) // seq_len
        expected.update(tuple(whole[at * seq_len : (at + 1) * seq_len]) for at in range(count))
    size = loader.windows_per_epoch
    assert size == expected.total()
    rows = rows_of(take(loader, -(-2 * size // batch_size)))
    assert Counter(rows[:size]) == expected
    assert Counter(rows[size : 2 * size]) == expected
    if size > 20 and seq_len > 8:
        assert rows[:size] != rows[size : 2 * size]


def test_targets_are_the_next_tokens(corpora: list[Corpus], tokenizer: Tokenizer):
    """targets[t] is the token after input t, but BOS, which is given, is never a target."""
    stream = corpora[0].stream("train")
    whole = stream.read(0, len(stream)).tolist()
    text = ",".join(map(str, whole))
    for batch, _ in take(Loader(corpora[0], batch_size=4, seq_len=16, seed=1), 5):
        for inputs, targets in zip(batch.input_ids.tolist(), batch.targets.tolist(), strict=True):
            filled = [tokenizer.bos_id if target == -100 else target for target in targets]
            assert filled[:-1] == inputs[1:]
            assert ",".join(map(str, [*inputs, filled[-1]])) in text
            assert tokenizer.bos_id not in targets


@pytest.mark.property
@pytest.mark.kills("data.corpus.loader", "self._start = start or LoaderState(", "self._start = LoaderState(")
@QUICK
@given(position=st.integers(0, 30), batch_size=st.integers(1, 9), weights=st.sampled_from([None, (3.0, 1.0)]))
def test_resuming_anywhere_equals_not_stopping(
    corpora: list[Corpus], position: int, batch_size: int, weights: tuple[float, ...] | None
):
    """A loader started from any saved state, through JSON, continues with the very batches; also a second time."""
    options: dict[str, Any] = {"batch_size": batch_size, "seq_len": 12, "seed": 3, "weights": weights}
    straight = take(Loader(*corpora, **options), position + 6)
    state = None
    if position:
        state = LoaderState.from_dict(json.loads(json.dumps(straight[position - 1][1].to_dict())))
    once = take(Loader(*corpora, **options, start=state), 3)
    twice = take(Loader(*corpora, **options, start=once[-1][1]), 3)
    for (expected, after), (found, now) in zip(straight[position:], once + twice, strict=True):
        assert same(expected, found)
        assert after == now


def test_a_state_is_small_and_does_not_grow(corpora: list[Corpus]):
    """After 300 batches the state is as long as after one, but for digits."""
    states = [state for _, state in take(Loader(*corpora, batch_size=8, seq_len=8, seed=0), 300)]
    assert len(json.dumps(states[-1].to_dict())) < len(json.dumps(states[0].to_dict())) + 12


@pytest.mark.property
@pytest.mark.kills(
    "data.corpus.loader", "rows_of_rank(batch_size, rank, world_size)", "slice(0, batch_size // world_size)"
)
@QUICK
@given(world_size=st.sampled_from([1, 2, 3, 6]), mask=st.booleans())
def test_ranks_share_one_global_batch(corpora: list[Corpus], *, world_size: int, mask: bool):
    """The rows of all ranks, in order, are the batch of one rank; states are equal on all ranks."""
    options: dict[str, Any] = {"batch_size": 6, "seq_len": 10, "seed": 2, "mask_documents": mask}
    alone = take(Loader(*corpora, **options), 5)
    ranks = [take(Loader(*corpora, **options, rank=rank, world_size=world_size), 5) for rank in range(world_size)]
    for step, (whole, after) in enumerate(alone):
        parts = [found[step][0] for found in ranks]
        assert all(len(part.input_ids) == 6 // world_size for part in parts)
        documents = tuple(spans for part in parts for spans in part.documents or ()) if mask else None
        joined = Batch(
            torch.cat([part.input_ids for part in parts]),
            torch.cat([part.targets for part in parts]),
            documents,
            sum(part.num_bytes or 0 for part in parts),
        )
        assert same(whole, joined)
        assert {found[step][1] for found in ranks} == {after}


def test_another_batch_size_or_world_size_goes_on_in_the_same_order(corpora: list[Corpus]):
    """A run may resume on more ranks or with larger batches: the order of windows is the same."""
    first = take(Loader(*corpora, batch_size=4, seq_len=10, seed=2), 6)
    state = first[2][1]
    larger = take(Loader(*corpora, batch_size=12, seq_len=10, seed=2, start=state), 1)
    assert rows_of(larger) == rows_of(first[3:])


def test_weights_are_the_shares_of_samples(make_corpus: Callable[..., Corpus]):
    """With weights 3 to 1, of every 4 samples 3 come from the first corpus, whatever the sizes."""
    corpora = [make_corpus([letter * 50] * 40, name=letter, dedup=False) for letter in "xz"]
    loader = Loader(*corpora, batch_size=4, seq_len=5, seed=0, weights=[3, 1])
    marks = [set(corpus.stream("train").read(1, 5).tolist()) for corpus in corpora]
    assert not marks[0] & marks[1]
    for number, (batch, state) in enumerate(take(loader, 50), 1):
        from_second = sum(bool(marks[1] & set(row)) for row in batch.input_ids.tolist())
        assert from_second == 1
        assert state.drawn == (3 * number, number)


def test_epochs_are_counted(corpora: list[Corpus]):
    """state.epoch is the number of full passes over all windows."""
    loader = Loader(*corpora, batch_size=5, seq_len=12, seed=0)
    for number, (_, state) in enumerate(take(loader, 80), 1):
        assert state.samples == 5 * number
        assert state.epoch == 5 * number // loader.windows_per_epoch
    assert loader.batches_per_epoch == loader.windows_per_epoch / 5
    assert state.epoch >= 2


def test_documents_start_where_bos_stands(corpora: list[Corpus], tokenizer: Tokenizer):
    """In each row a document starts at 0 and at each BOS, and ends at the next; they are left out when not wanted."""
    for batch, _ in take(Loader(*corpora, batch_size=4, seq_len=64, seed=0), 10):
        starts = batch.input_ids == tokenizer.bos_id
        starts[:, 0] = False
        assert batch.documents == document_spans(starts.cumsum(1))
    batch, _ = take(Loader(*corpora, batch_size=4, seq_len=64, seed=0, mask_documents=False), 1)[0]
    assert batch.documents is None


def test_documents_of_a_tokenizer_with_one_boundary_token(
    make_corpus: Callable[..., Corpus], tokenizer: Tokenizer, tmp_path: Any
):
    """Where BOS is EOS, a document starts at the second of two, and its closing one is still a target."""
    tokenizer.save(tmp_path / "t")
    content = json.loads((tmp_path / "t/tokenizer.json").read_text())
    corpus = make_corpus(["aaa", "bbb", "ccc"], encoder=Tokenizer(content, {"bos_token": None, "eos_token": "<|eos|>"}))
    stream = corpus.stream("train")
    ids = stream.read(0, len(stream)).tolist()
    batch, _ = take(Loader(corpus, batch_size=1, seq_len=len(ids) - 1, seed=0), 1)[0]
    expected_targets = ids[1:]
    for at, index in enumerate(ids[1:]):
        if index == 1 and ids[at] == 1:
            expected_targets[at] = -100
    assert batch.targets.tolist() == [expected_targets]
    assert batch.documents == (((0, 5), (5, 10), (10, 14)),)
    assert batch.num_bytes == 9


@pytest.mark.property
@pytest.mark.kills(
    "data.corpus.loader", "total = -(-(len(stream) - 1) // seq_len)", "total = (len(stream) - 1) // seq_len"
)
@QUICK
@given(seq_len=st.integers(1, 50), batch_size=st.integers(1, 6))
def test_validation_covers_every_token_once(corpora: list[Corpus], seq_len: int, batch_size: int):
    """In order, each id but BOS is a target exactly once; the bytes are those of the documents."""
    for corpus in corpora:
        stream = corpus.stream("val")
        ids = stream.read(0, len(stream)).tolist()
        bos = corpus.manifest.tokenizer.bos_id
        batches = list(validation_batches(corpus, batch_size=batch_size, seq_len=seq_len))
        targets = [target for batch in batches for target in batch.targets.flatten().tolist()]
        assert [target for target in targets if target != -100] == [index for index in ids if index != bos]
        assert sum(batch.num_bytes or 0 for batch in batches) == corpus.manifest.splits["val"].bytes
        assert all(batch.input_ids.shape[1] == seq_len for batch in batches)


def test_padding_is_a_document_of_its_own(corpora: list[Corpus]):
    """The fill of the last window is masked, and apart from the document before it."""
    corpus = corpora[0]
    length = len(corpus.stream("val"))
    (batch,) = validation_batches(corpus, batch_size=1, seq_len=length + 7)
    assert (batch.targets[0, -8:] == -100).all()
    assert batch.documents is not None
    assert batch.documents[0][-1] == (length - 1, length + 7)
    assert (batch.input_ids[0, length - 1 :] == 0).all()


class Ids:
    """A split of given ids."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = np.array(ids, dtype=np.uint16)

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]


@pytest.mark.parametrize(("length", "shapes"), [(2, [1]), (5, [1]), (6, [2]), (9, [2]), (10, [2, 1])])
def test_validation_has_no_window_without_a_target(
    corpora: list[Corpus], monkeypatch: pytest.MonkeyPatch, length: int, shapes: list[int]
):
    """Two ids are enough for a window; a split that windows of four fill exactly gets no empty one behind them."""
    monkeypatch.setattr(corpora[0], "stream", lambda _split: Ids([7] * length))
    batches = list(validation_batches(corpora[0], batch_size=2, seq_len=4))
    assert [len(batch.input_ids) for batch in batches] == shapes
    assert sum(batch.num_targets for batch in batches) == length - 1
    assert all((batch.targets != -100).any(1).all() for batch in batches)


def test_padding_behind_a_document_that_just_began_is_another(corpora: list[Corpus], monkeypatch: pytest.MonkeyPatch):
    """The fill counts on from the last token, not from the one before it."""
    entry = corpora[0].manifest.tokenizer
    monkeypatch.setattr(corpora[0], "stream", lambda _split: Ids([7, entry.eos_id, entry.bos_id, 7]))
    (batch,) = validation_batches(corpora[0], batch_size=1, seq_len=5)
    assert batch.documents == (((0, 2), (2, 3), (3, 5)),)


def test_a_document_that_begins_behind_a_window_is_none_of_its(corpora: list[Corpus], monkeypatch: pytest.MonkeyPatch):
    """The boundary is the last target, whose token the window does not hold: no empty document comes of it."""
    entry = corpora[0].manifest.tokenizer
    monkeypatch.setattr(corpora[0], "stream", lambda _split: Ids([7, entry.eos_id, entry.bos_id, 7, 7, entry.bos_id]))
    (batch,) = validation_batches(corpora[0], batch_size=1, seq_len=5)
    assert batch.documents == (((0, 2), (2, 5)),)


def test_a_single_id_is_no_validation_split(corpora: list[Corpus], monkeypatch: pytest.MonkeyPatch):
    """It has no target."""
    monkeypatch.setattr(corpora[0], "stream", lambda _split: Ids([7]))
    with pytest.raises(DataError, match="has no val split"):
        next(validation_batches(corpora[0], batch_size=2, seq_len=4))


def test_bytes_of_sentencepiece_batches_leave_out_the_added_space(make_corpus: Callable[..., Corpus]):
    """The space that stands before a document in its tokens is not counted as text."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "added_tokens": [{"id": at, "content": name, **flags} for name, at in vocab.items() if at < 3],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {"type": "BPE", "unk_token": "<unk>", "vocab": vocab, "merges": [["▁", "a"]]},
    }
    documents = ["a a", "aaa", "a  a a"]
    corpus = make_corpus(documents, encoder=Tokenizer(content))
    assert corpus.manifest.lossy_documents == 0
    for seq_len in (1, 3, 50):
        batches = validation_batches(corpus, batch_size=2, seq_len=seq_len, split="train")
        assert sum(batch.num_bytes or 0 for batch in batches) == sum(map(len, documents))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ConfigError, "batch_size must be at least 1, got 0"),
        ({"seq_len": 0}, ConfigError, "seq_len must be at least 1, got 0"),
        ({"world_size": 0}, ConfigError, "world_size must be at least 1, got 0"),
        ({"batch_size": 5, "world_size": 2}, ConfigError, r"batch_size \(5, over all ranks\) must be a multiple of"),
        ({"rank": 2, "world_size": 2}, ConfigError, r"and rank \(2\) below it"),
        ({"weights": [1.0]}, ConfigError, r"weights must be 2 positive numbers, one for each corpus, got \[1.0\]"),
        ({"weights": [1.0, 0.0]}, ConfigError, "weights must be 2 positive numbers"),
        ({"weights": [1.0, float("inf")]}, ConfigError, "weights must be 2 positive numbers"),
        ({"weights": [1.0, float("nan")]}, ConfigError, "weights must be 2 positive numbers"),
        ({"seq_len": 5000}, DataError, "is smaller than a window: .* tokens, seq_len 5000 needs 5001; lower seq_len"),
        ({"batch_size": 1000}, DataError, r"the batch is larger than the corpus: .* windows of 16, batch_size is 1000"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    corpora: list[Corpus], options: dict[str, Any], error: type[Exception], message: str
):
    """Each rule has its message with the values."""
    with pytest.raises(error, match=message):
        Loader(*corpora, **{"batch_size": 4, "seq_len": 16, "seed": 0, **options})


def test_no_corpus_is_refused():
    """A loader of nothing."""
    with pytest.raises(DataError, match="a loader needs at least one corpus"):
        Loader(batch_size=1, seq_len=1, seed=0)


def test_corpora_of_different_tokenizers_are_refused(make_corpus: Callable[..., Corpus], corpora: list[Corpus]):
    """Both folders are named."""
    other = make_corpus(STORIES, encoder=train_bpe(["other"], 259))
    with pytest.raises(DataError, match=r"a and .*corpus were made with different tokenizers; prepare both"):
        Loader(corpora[0], other, batch_size=1, seq_len=8, seed=0)


@pytest.mark.parametrize("change", [{"seed": 1}, {"seq_len": 9}, {"weights": [1, 2]}])
def test_a_position_in_other_data_is_refused(corpora: list[Corpus], change: dict[str, Any]):
    """Resuming with another seed, length, weight or order of corpora is an error, not another order."""
    options: dict[str, Any] = {"batch_size": 2, "seq_len": 8, "seed": 0}
    _, state = take(Loader(*corpora, **options), 1)[0]
    with pytest.raises(DataError, match="the saved position belongs to other data"):
        Loader(*corpora, **{**options, **change}, start=state)
    with pytest.raises(DataError, match="the saved position belongs to other data"):
        Loader(*reversed(corpora), **options, start=state)


def test_validation_of_a_corpus_without_held_out_text_is_refused(make_corpus: Callable[..., Corpus]):
    """The message says why and what to do."""
    with pytest.raises(DataError, match="has no val split: it was prepared with val_fraction 0"):
        next(validation_batches(make_corpus(["a"]), batch_size=1, seq_len=4))
