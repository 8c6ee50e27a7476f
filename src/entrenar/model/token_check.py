"""Refuse invalid model inputs: ids of another shape or of another vocabulary, or targets that do not match the ids.

Torch would read beyond the embedding on a GPU, broadcast a wrong shape, or say "index out of range in self".
"""

import torch
from torch import Tensor

from entrenar.errors import DataError
from entrenar.ops import DocumentSpans

_WHOLE_NUMBERS = (torch.int64, torch.int32)


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
