"""Round the model of a conversion or a run to a budget of bits: `quantize`, with a generator to calibrate by."""

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from entrenar import ops
from entrenar.errors import DataError
from entrenar.infer import GenerateConfig, generate
from entrenar.interop.source import Rounded, Source
from entrenar.model import Llama
from entrenar.quantize import NO_ADAPTERS, Adapters, Budget, calibration_rows, quantize_to_budget


def round_to_budget(
    source: Source,
    bits: float,
    calibration: Path | None,
    on_stage: Callable[[str], None],
    adapters: Adapters = NO_ADAPTERS,
) -> tuple[Source, Budget]:
    """Return a source that is written with its matrices rounded to a budget, and what that came to.

    Raises:
        ConfigError, DataError: see `quantize_to_budget` and `calibration_rows`.
    """
    if source.tokenizer is None:
        raise DataError(
            "a budget of bits needs a tokenizer to calibrate with, and the model has none; give --tokenizer"
        )
    # Modules of its own over the same weights: what is compared with it afterwards must stay as it was.
    model = copy.deepcopy(source.model, {id(parameter): parameter for parameter in source.model.parameters()})
    model.set_compute_dtype(ops.fastest_compute_dtype(model.dtype, model.device))
    rows = calibration_rows(model, source.tokenizer, calibration, continue_rows)
    budget = quantize_to_budget(model, rows, bits, on_stage, adapters)
    return replace(source, rounded=Rounded(model, budget.bits)), budget


def continue_rows(model: Llama, rows: Sequence[Sequence[int]], count: int) -> Iterable[Sequence[int | None]]:
    """Sample `count` tokens after each row, whatever they are."""
    return generate(model, rows, GenerateConfig(max_new_tokens=count, eos_token_ids=()))
