"""What a model refuses to be given: ids of another shape, of another vocabulary, or beside targets that do not match.

Torch would read beyond the embedding on a GPU, broadcast a wrong shape, or say "index out of range in self".
"""

import torch
from torch import Tensor

from entrenar.errors import DataError
from entrenar.ops import Documents

_WHOLE_NUMBERS = (torch.int64, torch.int32)


def check_token_ids(input_ids: Tensor, vocab_size: int, targets: Tensor | None, documents: Documents | None) -> None:
    """Refuse ids that have no meaning here; their range is looked at on a CPU alone, where that makes no device wait.

    Raises: DataError naming the rule, what was given, and what to do.
    """
    shape = tuple(input_ids.shape)
    if input_ids.ndim != 2 or input_ids.dtype not in _WHOLE_NUMBERS or not input_ids.numel():
        raise DataError(f"token ids must be whole numbers in (B, T), got {input_ids.dtype} of shape {shape}")
    for name, other in (("targets", targets), ("document ids", documents.ids if documents is not None else None)):
        if other is not None and other.shape != input_ids.shape:
            raise DataError(f"{name} must have the shape {shape} of the token ids, got {tuple(other.shape)}")
    if input_ids.device.type == "cpu":
        least, most = (int(bound) for bound in torch.aminmax(input_ids))
        if least < 0 or most >= vocab_size:
            wrong = least if least < 0 else most
            raise DataError(
                f"token ids must be in [0, {vocab_size}), got {wrong}: the tokenizer's vocabulary must fit the model's"
            )
