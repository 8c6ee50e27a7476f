"""Merge an adapter into its base, and measure what that changed.

base -> adapter over it -> logits on a probe -> merged weights -> logits again -> a model folder
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from entrenar.data import Tokenizer
from entrenar.errors import ConfigError, DataError
from entrenar.files import atomic_directory
from entrenar.interop import save_model
from entrenar.interop.hf_peft import BaseIdentity, load_adapter, read_base
from entrenar.model import Llama
from entrenar.peft import DEFAULT_ADAPTER, MergeReport, checked_merge, quantized_projections, unload, widen
from entrenar.recipe.models import model_folder, open_model

_PROBE_SEED = 0


@dataclass(frozen=True)
class MergeOptions:
    """Settings for a merge.

    Attributes:
        dtype: of the merged weights; None for the base's.
        refuse_above: write nothing if a logit moves by more than this.
        probe: a text to compare logits on; None for random tokens.
        probe_tokens: how many of its tokens to compare on.
        is_other_base_allowed: merge although the adapter names another base.
        overwrite: replace a folder that exists.
    """

    dtype: torch.dtype | None = None
    refuse_above: float | None = None
    probe: Path | None = None
    probe_tokens: int = 256
    is_other_base_allowed: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Merged:
    """The result of a merge.

    Attributes:
        report: how far the logits moved.
        quantized_base: the identity of the quantized base that the adapter was trained over, if it was merged into
            the unquantized one instead.
    """

    report: MergeReport
    quantized_base: BaseIdentity | None


def merge_adapter(base: Path, adapter: Path, out: Path, options: MergeOptions) -> Merged:
    """Add an adapter to the weights of its base in float32, and write a model folder to `out`.

    Raises:
        ConfigError, DataError, FormatError: a folder cannot be used, or `out` is not free.
        GateFailed: merging moves a logit by more than is allowed; nothing is written.
    """
    if out.resolve() in (base.resolve(), adapter.resolve()):
        raise ConfigError(f"OUT must be another folder than BASE and ADAPTER, got {out}")
    if out.exists() and not options.overwrite:
        raise ConfigError(f"{out} exists already; give --overwrite or another folder")
    model, tokenizer = open_model(base, dtype=options.dtype)
    folder = model_folder(adapter)
    if (folder / "tokenizer.json").is_file():  # with the chat template that the adapter was trained with
        tokenizer = Tokenizer.load(folder)
    load_adapter(folder, model, is_other_base_allowed=options.is_other_base_allowed)
    trained_over, is_quantized = read_base(folder), next(quantized_projections(model), None) is not None
    probe = _probe(model, tokenizer, options.probe, options.probe_tokens)
    report = checked_merge(model, DEFAULT_ADAPTER, probe, refuse_above=options.refuse_above)
    unload(model)
    widen(model)
    with atomic_directory(out) as written:
        save_model(written, model.config, model.state_dict(), generation=model.generation)
        tokenizer.save(written)
    is_other = trained_over is not None and trained_over.is_quantized and not is_quantized
    return Merged(report, trained_over if is_other else None)


def _probe(model: Llama, tokenizer: Tokenizer, text: Path | None, count: int) -> Int[Tensor, "1 T"]:
    count = min(count, model.config.max_seq_len)
    if count < 1:
        raise ConfigError(f"--probe-tokens must be > 0, got {count}")
    if text is None:
        generator = torch.Generator().manual_seed(_PROBE_SEED)
        return torch.randint(model.config.vocab_size, (1, count), generator=generator)
    try:
        ids = tokenizer.encode(text.read_text(encoding="utf-8"))[:count]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--probe {text} cannot be read as text: {error}") from error
    if not ids:
        raise DataError(f"--probe {text} holds no token")
    return torch.tensor([ids])
