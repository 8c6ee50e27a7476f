"""Calibration: the tokens that a model is rounded on, and what they show of its inputs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn

from entrenar.data import Tokenizer
from entrenar.errors import DataError
from entrenar.model import Llama

CALIBRATION_ROWS, CALIBRATION_LENGTH = 32, 256

# Samples a number of tokens after each of some rows, and yields one for each row at a time.
Continue = Callable[[Llama, Sequence[Sequence[int]], int], Iterable[Sequence[int | None]]]


def calibration_rows(
    model: Llama, tokenizer: Tokenizer, text: Path | None, continue_rows: Continue
) -> Int[Tensor, "rows length"]:
    """Return tokens to calibrate on: from a text, or else from the model itself (arXiv:2305.17888).

    Raises:
        DataError: the text cannot be read, or is shorter than two rows.
    """
    length = min(CALIBRATION_LENGTH, model.config.context_length - 1) + 1
    if text is None:
        return _written_rows(model, tokenizer, length, continue_rows)
    try:
        ids = tokenizer.encode(text.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"calibration text {text} cannot be read: {error}") from error
    rows = min(len(ids) // length, CALIBRATION_ROWS)
    if rows < 2:
        raise DataError(f"a calibration text must have at least {2 * length} tokens, got {len(ids)} in {text}")
    # Spread over the whole text: a file often begins with something unlike the rest.
    starts = torch.linspace(0, len(ids) - length, rows).long()
    return torch.tensor(ids)[starts[:, None] + torch.arange(length)]


def _written_rows(model: Llama, tokenizer: Tokenizer, length: int, continue_rows: Continue) -> Tensor:
    first = tokenizer.bos_id if tokenizer.bos_id is not None else 0
    rows: list[list[int]] = [[first] for _ in range(CALIBRATION_ROWS)]
    for step in continue_rows(model, rows, length - 1):
        for row, token in zip(rows, step, strict=True):
            row.append(first if token is None else token)
    return torch.tensor(rows)


class InputMoments:
    """Sums xᵀx over all inputs of some modules; the sums weigh the modules' rounding errors."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.sums: dict[str, Tensor] = {}
        self._handles = [module.register_forward_pre_hook(self._adder(name)) for name, module in modules.items()]

    def _adder(self, name: str) -> Callable[..., None]:
        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2).float()  # (N, I)
            if name in self.sums:
                self.sums[name].addmm_(rows.mT, rows)
            else:
                self.sums[name] = rows.mT @ rows

        return add

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
