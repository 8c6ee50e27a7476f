"""Batches of fixed-length windows: shuffled without memory, mixed by weight, resumed exactly.

The ids of a corpus are one long sequence; window k is ids k·T … k·T + T, so the windows of an epoch cover the
sequence once (a rest shorter than T is left out). Sample number n of a corpus is window `permute(n mod W)` under a
key of seed, corpus and epoch n div W: any position can be computed from counters, so the state is a few integers and
resuming costs nothing.

The order is global. Rank r of w takes rows r·B/w … (r+1)·B/w of every batch of B rows, so the union over ranks is the
same batch for every number of ranks.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from entrenar.data.batch import IGNORED, Batch, LoaderState, check_ranks, rows_of_rank
from entrenar.data.corpus.corpus import Corpus, Split, TokenStream
from entrenar.data.corpus.mixing import draw, integer_weights
from entrenar.data.corpus.permutation import permute, round_keys
from entrenar.errors import ConfigError, DataError

_SHUFFLE = 0x5348_5546


@dataclass(frozen=True)
class _Windows:
    """A split of a corpus as windows of `seq_len` inputs."""

    corpus: Corpus
    stream: TokenStream
    seq_len: int

    @property
    def count(self) -> int:
        return max(0, (len(self.stream) - 1) // self.seq_len)

    def read(self, index: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the seq_len + 1 ids of a window, fewer for the last one of a split."""
        start = index * self.seq_len
        return self.stream.read(start, min(start + self.seq_len + 1, len(self.stream))).astype(np.int64)


class Loader:
    """Endless training batches; iterate for (Batch, LoaderState after it)."""

    def __init__(
        self,
        *corpora: Corpus,
        batch_size: int,
        seq_len: int,
        seed: int,
        weights: Sequence[float] | None = None,
        rank: int = 0,
        world_size: int = 1,
        mask_documents: bool = True,
        start: LoaderState | None = None,
    ) -> None:
        """Set up to read `batch_size` rows (over all ranks) of `seq_len` inputs, from `start` on.

        `weights` are the shares of samples from each corpus; without them every window of every corpus comes once an
        epoch.

        Raises: ConfigError for settings that break a rule; DataError for corpora that do not fit them or each other,
        and for a state of another run.
        """
        _check_settings(corpora, batch_size, seq_len, rank, world_size)
        self._windows = [_Windows(corpus, corpus.stream("train"), seq_len) for corpus in corpora]
        _check_corpora(corpora, self._windows, batch_size, seq_len)
        self.windows_per_epoch = sum(windows.count for windows in self._windows)
        self._weights = _checked_weights(weights, [windows.count for windows in self._windows])
        self._batch_size, self._seq_len, self._seed = batch_size, seq_len, seed
        self._rows = rows_of_rank(batch_size, rank, world_size)
        self._mask_documents = mask_documents
        self.fingerprint = self._fingerprint()
        self._start = start or LoaderState(0, (0,) * len(corpora), 0, self.fingerprint)
        if self._start.fingerprint != self.fingerprint or len(self._start.drawn) != len(corpora):
            raise DataError(
                "the saved position belongs to other data: corpora, their order or weights, seq_len or seed changed "
                f"(saved {self._start.fingerprint[:12]}…, now {self.fingerprint[:12]}…); restore them or start again"
            )

    @property
    def batches_per_epoch(self) -> float:
        """The number of batches in one pass."""
        return self.windows_per_epoch / self._batch_size

    def __iter__(self) -> Iterator[tuple[Batch, LoaderState]]:
        state = self._start
        while True:
            batch, state = self._next(state)
            yield batch, state

    def _next(self, state: LoaderState) -> tuple[Batch, LoaderState]:
        chosen = draw(self._weights, state.drawn, self._batch_size)
        drawn = np.array(state.drawn)
        rows = np.zeros((self._batch_size, 2), dtype=np.int64)  # corpus, window
        for number, windows in enumerate(self._windows):
            mine = np.flatnonzero(chosen == number)
            rows[mine, 0] = number
            rows[mine, 1] = self._order(number, windows.count, int(drawn[number]), len(mine))
            drawn[number] += len(mine)
        samples = state.samples + self._batch_size
        after = LoaderState(
            samples, tuple(int(count) for count in drawn), samples // self.windows_per_epoch, self.fingerprint
        )
        picked = [(self._windows[corpus], int(window)) for corpus, window in rows[self._rows]]
        return make_batch(picked, self._seq_len, mask_documents=self._mask_documents), after

    def _order(self, number: int, count: int, first: int, wanted: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the windows of samples first … first+wanted-1 of a corpus, across epochs."""
        samples = np.arange(first, first + wanted, dtype=np.uint64)
        epochs, places = samples // np.uint64(count), samples % np.uint64(count)
        order = np.empty(wanted, dtype=np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            keys = round_keys(_SHUFFLE, self._seed, number, int(epoch))
            order[here] = permute(places[here], count, keys).astype(np.int64)
        return order

    def _fingerprint(self) -> str:
        identity = {
            "corpora": [windows.corpus.fingerprint for windows in self._windows],
            "weights": self._weights,
            "seq_len": self._seq_len,
            "seed": self._seed,
        }
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def validation_batches(
    corpus: Corpus, *, batch_size: int, seq_len: int, mask_documents: bool = True, split: Split = "val"
) -> Iterator[Batch]:
    """Yield the split in order, every id a target once (except the given BOS); fill the end with -100.

    Raises: DataError for an empty split.
    """
    stream = corpus.stream(split)
    if len(stream) < 2:
        raise DataError(
            f"corpus {corpus.folder} has no {split} split: it was prepared with val_fraction 0; prepare it again with "
            "a larger --val-fraction"
        )
    windows = _Windows(corpus, stream, seq_len)
    total = -(-(len(stream) - 1) // seq_len)
    for first in range(0, total, batch_size):
        picked = [(windows, index) for index in range(first, min(first + batch_size, total))]
        yield make_batch(picked, seq_len, mask_documents=mask_documents)


def make_batch(picked: Sequence[tuple[_Windows, int]], seq_len: int, *, mask_documents: bool) -> Batch:
    """Read windows into a batch."""
    inputs = np.zeros((len(picked), seq_len), dtype=np.int64)
    targets = np.full((len(picked), seq_len), IGNORED, dtype=np.int64)
    documents = []
    num_bytes = 0
    for row, (windows, index) in enumerate(picked):
        ids = windows.read(index)
        used = len(ids) - 1
        entry = windows.corpus.manifest.tokenizer
        starts = ids[1:] == entry.bos_id
        if entry.bos_id == entry.eos_id:
            starts &= ids[:-1] == entry.eos_id
        inputs[row, :used] = ids[:-1]
        targets[row, :used] = np.where(starts, IGNORED, ids[1:])
        edges = [0, *(np.flatnonzero(starts[:-1]) + 1).tolist(), used, *([seq_len] if used < seq_len else [])]
        documents.append(tuple(pairwise(edges)))
        num_bytes += int(windows.corpus.token_bytes[ids[1:]].sum())
        if entry.adds_space:
            num_bytes -= int(np.count_nonzero((ids[:-1] == entry.bos_id) & (ids[1:] != entry.eos_id)))
    return Batch(
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        tuple(documents) if mask_documents else None,
        num_bytes,
    )


def _check_settings(corpora: Sequence[Corpus], batch_size: int, seq_len: int, rank: int, world_size: int) -> None:
    if not corpora:
        raise DataError("a loader needs at least one corpus")
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len), ("world_size", world_size)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    check_ranks(batch_size, rank, world_size)


def _check_corpora(corpora: Sequence[Corpus], windows: Sequence[_Windows], batch_size: int, seq_len: int) -> None:
    first = corpora[0].manifest.tokenizer
    for corpus in corpora:
        if corpus.manifest.tokenizer.sha256 != first.sha256:
            raise DataError(
                f"corpora {corpora[0].folder} and {corpus.folder} were made with different tokenizers; "
                "prepare both with the same one (--tokenizer)"
            )
    for one in windows:
        if one.count == 0:
            raise DataError(
                f"corpus {one.corpus.folder} is smaller than a window: {len(one.stream)} tokens, "
                f"seq_len {seq_len} needs {seq_len + 1}; lower seq_len or add text"
            )
    total = sum(one.count for one in windows)
    if total < batch_size:
        tokens = sum(len(one.stream) for one in windows)
        raise DataError(
            f"the batch is larger than the corpus: {tokens} tokens give {total} windows of {seq_len}, "
            f"batch_size is {batch_size}; lower batch_size or seq_len, or add text"
        )


def _checked_weights(weights: Sequence[float] | None, counts: Sequence[int]) -> tuple[int, ...]:
    if weights is None:
        return tuple(counts)
    if len(weights) != len(counts) or not all(0 < weight < float("inf") for weight in weights):
        raise ConfigError(f"weights must be {len(counts)} positive numbers, one for each corpus, got {list(weights)}")
    return integer_weights(weights)
