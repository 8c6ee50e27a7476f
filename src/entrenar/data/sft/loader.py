"""Batches of examples: packed into rows, grouped by length, or padded; in an order computed from counters.

The rows are laid out once, from the lengths alone. An epoch visits every row once; batch number n is found from n, the
seed and the epoch, so the state is one integer and a fingerprint, and resuming costs nothing.

    packed    best-fit-decreasing rows; examples that share a row do not see each other
    grouped   examples of like length share a batch; the batches are shuffled
    padded    examples are shuffled, each in a row of its own

A batch is as long as its longest row; the others are filled with a document that has no target. The order is global:
each rank takes its share of the rows of every batch, so all ranks together train the same batches as one would.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any, Self

import numpy as np
import torch

from entrenar.data.batch import IGNORED, Batch, check_ranks, rows_of_rank
from entrenar.data.corpus.permutation import permute, round_keys
from entrenar.data.sft.encode import Example
from entrenar.data.sft.packing import pack
from entrenar.data.sft.settings import Batching
from entrenar.errors import DataError

_SHUFFLE = 0x5346_5453
Layout = list[list[int]]


@dataclass(frozen=True)
class SftState:
    """The position after a batch: batches made in all. `fingerprint` names examples, layout and seed."""

    batches: int
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """Restore what `to_dict` gave.

        Raises: DataError.
        """
        batches, fingerprint = content.get("batches"), content.get("fingerprint")
        if type(batches) is not int or batches < 0 or not isinstance(fingerprint, str):
            raise DataError(f"loader state is not usable: batches and fingerprint are not in {content!r}")
        return cls(batches, fingerprint)


class SftLoader:
    """Endless training batches; iterate for (Batch, SftState after it)."""

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        batching: Batching = "packed",
        rank: int = 0,
        world_size: int = 1,
        start: SftState | None = None,
    ) -> None:
        """Lay out the rows, `batch_size` of them in a batch over all ranks.

        Raises: DataError for no example, one longer than `seq_len`, and for a state of other data; ConfigError for a
        batch that the ranks cannot share.
        """
        check_ranks(batch_size, rank, world_size)
        if not examples:
            raise DataError("a loader needs at least one example, got none")
        self._examples, self._seed = examples, seed
        self._rows = lay_out([example.num_inputs for example in examples], seq_len, batching)
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._is_grouped = batching == "grouped"
        self.batches_per_epoch = -(-len(self._rows) // batch_size)
        self.fingerprint = self._fingerprint(batching, seq_len)
        self._start = start or SftState(0, self.fingerprint)
        if self._start.fingerprint != self.fingerprint:
            raise DataError(
                "the saved position is in other data: rows, tokenizer, seq_len, batch_size, batching or seed changed "
                f"(saved {self._start.fingerprint[:12]}…, now {self.fingerprint[:12]}…); restore it or start again"
            )

    @property
    def num_rows(self) -> int:
        """Rows of one epoch."""
        return len(self._rows)

    def __iter__(self) -> Iterator[tuple[Batch, SftState]]:
        done = self._start.batches
        while True:
            batch = self._batch(done)
            done += 1
            yield batch, SftState(done, self.fingerprint)

    def _batch(self, number: int) -> Batch:
        epoch, place = divmod(number, self.batches_per_epoch)
        keys = round_keys(_SHUFFLE, self._seed, epoch)
        if self._is_grouped:
            place = int(permute(np.array([place], dtype=np.uint64), self.batches_per_epoch, keys)[0])
        first = place * self._batch_size
        places = np.arange(first, min(first + self._batch_size, len(self._rows)), dtype=np.uint64)
        rows = places if self._is_grouped else permute(places, len(self._rows), keys)
        mine = rows[rows_of_rank(len(rows), self._rank, self._world_size)]
        return make_batch([[self._examples[index] for index in self._rows[int(row)]] for row in mine])

    def _fingerprint(self, batching: Batching, seq_len: int) -> str:
        digest = hashlib.sha256(f"{batching} {seq_len} {self._batch_size} {self._seed}\n".encode())
        for example in self._examples:
            digest.update(hashlib.sha256(example.ids.tobytes() + example.is_trained.tobytes()).digest())
        return digest.hexdigest()


def lay_out(lengths: Sequence[int], seq_len: int, batching: Batching) -> Layout:
    """Return the rows: for each, the indices of its examples.

    Raises: DataError for a length over `seq_len`.
    """
    if batching == "packed":
        return pack(lengths, seq_len)
    too_long = next((index for index, length in enumerate(lengths) if length > seq_len), None)
    if too_long is not None:
        raise DataError(f"example {too_long} has {lengths[too_long]} tokens, a row holds {seq_len}")
    order = range(len(lengths))
    if batching == "grouped":
        return [[index] for index in sorted(order, key=lambda index: (lengths[index], index))]
    return [[index] for index in order]


def held_out_batches(examples: Sequence[Example], *, batch_size: int, seq_len: int) -> Iterator[Batch]:
    """Yield all examples once, packed, in a fixed order."""
    rows = pack([example.num_inputs for example in examples], seq_len)
    for first in range(0, len(rows), batch_size):
        yield make_batch([[examples[index] for index in row] for row in rows[first : first + batch_size]])


def make_batch(rows: Sequence[Sequence[Example]]) -> Batch:
    """Concatenate the examples of each row as separate documents.

    No row gives one token without a target: a rank that has no share of an epoch's last batch still takes its part.
    """
    if not rows:
        return Batch(torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), IGNORED), (((0, 1),),), None)
    length = max(sum(example.num_inputs for example in row) for row in rows)
    inputs = np.zeros((len(rows), length), dtype=np.int64)
    targets = np.full((len(rows), length), IGNORED, dtype=np.int64)
    documents = []
    for number, row in enumerate(rows):
        edges = [0, *accumulate(example.num_inputs for example in row)]
        for (start, end), example in zip(pairwise(edges), row, strict=True):
            inputs[number, start:end] = example.ids[:-1]
            targets[number, start:end] = np.where(example.is_trained[1:], example.ids[1:], IGNORED)
        documents.append(tuple(pairwise(edges if edges[-1] == length else [*edges, length])))
    return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), tuple(documents), None)
