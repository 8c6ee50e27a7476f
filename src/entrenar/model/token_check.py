"""Refuse invalid model inputs: ids of another shape or of another vocabulary, or targets that do not match the ids.

Torch would read beyond the embedding on a GPU, broadcast a wrong shape, or say "index out of range in self".
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from entrenar.errors import DataError
from entrenar.ops import DocumentSpans

IGNORED = -100
_WHOLE_NUMBERS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class AskedTargets:
    """The targets of a batch that are asked for.

    Attributes:
        places: indices into B·T of the tokens that have a target; None for all.
        ids: their targets, on the device of the tokens.
        are_checked: they were looked at on the host: none is ignored, each is in the vocabulary, and nobody has to
            ask the device.
    """

    places: Int[Tensor, " N"] | None
    ids: Int[Tensor, " N"]
    are_checked: bool

    @staticmethod
    def find(targets: Int[Tensor, "B T"], vocab_size: int, device: torch.device) -> "AskedTargets":
        """Look the targets up where they lie.

        Raises: DataError for a target outside the vocabulary, if they lie on the host and the tokens do not.
        """
        if torch.compiler.is_compiling():
            return AskedTargets(None, targets.flatten().to(device), are_checked=False)  # it cannot know how many
        places = (targets.flatten() != IGNORED).nonzero()[:, 0]
        ids = targets.flatten()[places]
        is_ahead = targets.device != device  # on the CPU the loss itself checks
        if is_ahead and len(ids):
            least, most = (int(bound) for bound in torch.aminmax(ids))
            if least < 0 or most >= vocab_size:
                raise DataError(
                    f"targets must be {IGNORED} (ignored) or in [0, {vocab_size}), got {least if least < 0 else most}: "
                    "the tokenizer's vocabulary must fit the model's"
                )
        moved = None if len(places) == targets.numel() else places.to(device, non_blocking=True)
        return AskedTargets(moved, ids.to(device, non_blocking=True), are_checked=is_ahead)


def check_token_ids(
    input_ids: Tensor, vocab_size: int, targets: Tensor | None, documents: DocumentSpans | None
) -> None:
    """Refuse ids that have no meaning here; check their range only on a CPU, so that no device has to wait.

    Raises: DataError naming the rule, the value, and the remedy.
    """
    shape = tuple(input_ids.shape)
    if input_ids.ndim != 2 or input_ids.dtype not in _WHOLE_NUMBERS or not input_ids.numel():
        raise DataError(f"token ids must be whole numbers in (B, T), got {input_ids.dtype} of shape {shape}")
    if targets is not None and targets.shape != input_ids.shape:
        raise DataError(f"targets must have the shape {shape} of the token ids, got {tuple(targets.shape)}")
    if documents is not None:
        _check_documents(documents, *shape)
    if input_ids.device.type == "cpu":
        least, most = (int(bound) for bound in torch.aminmax(input_ids))
        if least < 0 or most >= vocab_size:
            wrong = least if least < 0 else most
            raise DataError(
                f"token ids must be in [0, {vocab_size}), got {wrong}: the tokenizer's vocabulary must fit the model's"
            )


def _check_documents(documents: DocumentSpans, num_rows: int, length: int) -> None:
    covered = [start for row in documents for start, _ in row], [end for row in documents for _, end in row]
    expected = [edge for row in documents for edge in (0, *(end for _, end in row[:-1]))]
    ends = {row[-1][1] if row else 0 for row in documents}
    if len(documents) != num_rows or covered[0] != expected or ends != {length}:
        raise DataError(
            f"documents must cover each of the {num_rows} rows of {length} tokens without a gap, "
            f"got {len(documents)} rows, the first with the spans {documents[0] if documents else ()}"
        )
