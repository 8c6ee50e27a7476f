"""Define the loader's output for training: a batch, and the position after it."""

from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from entrenar.errors import ConfigError, DataError

IGNORED = -100
DocumentSpans = tuple[tuple[tuple[int, int], ...], ...]


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, and the token to predict after each.

    Attributes:
        input_ids: the tokens.
        targets: `targets[b, t]` is the token after `input_ids[b, t]`, or -100 where nothing is trained.
        documents: for each row, the half-open (start, end) of each document, in order, covering the row; tokens of
            different documents must not see each other. Plain integers: the device is never asked for them.
        num_bytes: bytes of text that the targets stand for.
    """

    input_ids: Tensor  # int64 (B, T)
    targets: Tensor  # int64 (B, T)
    documents: DocumentSpans | None
    num_bytes: int | None

    @property
    def num_targets(self) -> int:
        """Number of trained positions."""
        return int((self.targets != IGNORED).sum())

    def split(self, rows: int) -> list["Batch"]:
        """Cut into batches of at most `rows` rows; the `num_bytes` of a part is unknown."""
        cuts = range(0, len(self.input_ids), rows)
        documents = self.documents
        return [
            Batch(
                self.input_ids[at : at + rows],
                self.targets[at : at + rows],
                None if documents is None else documents[at : at + rows],
                None,
            )
            for at in cuts
        ]

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on `device`."""
        moved = self.input_ids.to(device, non_blocking=True), self.targets.to(device, non_blocking=True)
        return Batch(*moved, self.documents, self.num_bytes)


def rows_of_rank(num_rows: int, rank: int, world_size: int) -> slice:
    """Return the rows of a batch that a rank takes: in order, all ranks together take each row once."""
    return slice(rank * num_rows // world_size, (rank + 1) * num_rows // world_size)


def check_ranks(batch_size: int, rank: int, world_size: int) -> None:
    """Refuse a batch that the ranks cannot share equally.

    Raises: ConfigError.
    """
    if world_size < 1 or batch_size % world_size or not 0 <= rank < world_size:
        raise ConfigError(
            f"batch_size ({batch_size}, over all ranks) must be a multiple of world_size ({world_size}), "
            f"and rank ({rank}) below it"
        )


@dataclass(frozen=True)
class LoaderState:
    """The position after a batch: `samples` drawn in all, `drawn` of each corpus, full passes made (`epoch`).

    `fingerprint` names what the position is a position in: corpora, window length, seed, weights.
    """

    samples: int
    drawn: tuple[int, ...]
    epoch: int
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Return the state as JSON can hold it."""
        return {**asdict(self), "drawn": list(self.drawn)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """Restore what `to_dict` gave.

        Raises: DataError.
        """
        try:
            samples, drawn, epoch = content["samples"], tuple(content["drawn"]), content["epoch"]
            numbers = (samples, epoch, *drawn)
            valid = all(type(number) is int and number >= 0 for number in numbers) and sum(drawn) == samples
            state = cls(samples, drawn, epoch, str(content["fingerprint"]))
        except (KeyError, TypeError) as error:
            raise DataError(f"loader state is not usable: {error!r} in {content!r}") from error
        if not valid:
            raise DataError(f"loader state is not usable: the counts of {content!r} are not whole or do not add up")
        return state
