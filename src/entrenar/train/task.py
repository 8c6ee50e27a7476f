"""Define the loop's inputs: a module, batches, a loss, a place to write, and nothing that knows language models."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from entrenar.runs import RunFolder
from entrenar.train.checkpoint import Checkpoint


class SplittableBatch(Protocol):
    """Rows with a loss that can be cut into smaller batches."""

    @property
    def num_targets(self) -> int:
        """Number of targets that the loss sums over."""

    def split(self, rows: int, /) -> "list[Any]":
        """Cut into batches of at most `rows` rows."""


class Position(Protocol):
    """The position in the data after the batch it came with."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""


BatchT = TypeVar("BatchT", bound=SplittableBatch)


@dataclass(frozen=True)
class Task(Generic[BatchT]):
    """A module, the data it learns from, and its loss.

    Attributes:
        batches: this rank's share of the data, each batch with the position after it.
        loss: returns the float32 *sum* over a batch's targets.
        write_model: writes the given weights as a model or adapter folder, from another thread while the next step's
            forward runs.
        write_index: writes a model folder without the files of weights, given the weights and the name of each one's
            file; where weights are in pieces, the ranks then write those files together. Without it one rank gathers
            all for `write_model`.
        saves_frozen: whether `write_model` is given the weights that are not trained too.
        read_model: returns the weights in such a folder under the module's own names.
        evaluate: returns held-out figures, "loss" among them; the module is in evaluation mode meanwhile.
        micro_batches_per_epoch: length of one pass over the data, if it is known.
        lr_factors: multiply the learning rate of the parameters they name.
    """

    module: nn.Module
    batches: Iterator[tuple[BatchT, Position]]
    loss: Callable[[BatchT], Tensor]
    write_model: Callable[[Path, Mapping[str, Tensor]], None]
    read_model: Callable[[Path], Mapping[str, Tensor]]
    evaluate: Callable[[], Mapping[str, float]] | None = None
    micro_batches_per_epoch: int | None = None
    lr_factors: Mapping[str, float] = field(default_factory=dict)
    saves_frozen: bool = True
    write_index: Callable[[Path, Mapping[str, Tensor], Mapping[str, str]], None] | None = None


@dataclass(frozen=True)
class Run:
    """A run's folder, the checkpoint it resumes from, and what its checkpoints remember.

    Attributes:
        inspect_code: describes the code that trains, as JSON values. Asked before the first step and at each
            checkpoint, which keeps the answer; it stops the run by raising TrainingHalted.
    """

    folder: Path
    config: Mapping[str, Any]
    resume: Checkpoint | None = None
    inspect_code: Callable[[], Mapping[str, Any]] = dict

    @property
    def files(self) -> RunFolder:
        """The paths in the run's folder."""
        return RunFolder(self.folder)
