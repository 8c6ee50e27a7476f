"""Open the base of a fine-tuning run: as stored, quantized while it is read, or rounded to a budget of bits.

Rounding to a budget takes a backward and minutes, and its last bits depend on the machine. So it is done once in the
life of a run and kept as a model folder in the run's own, which the adapter names as its base.
"""

from pathlib import Path

import torch
from torch import Tensor

from entrenar.config import FinetuneConfig
from entrenar.data import Tokenizer
from entrenar.errors import ConfigError, DataError
from entrenar.interop import is_quantized, load_model
from entrenar.interop.convert import Target, convert
from entrenar.interop.hf import open_folder
from entrenar.interop.safetensors_file import TensorReader
from entrenar.interop.source import Source
from entrenar.model import Llama
from entrenar.peft import find_saved, find_targets, from_base
from entrenar.peft.lora import OriginalWeight
from entrenar.quantize import EMBEDDING, HEAD, Adapters
from entrenar.recipe.adapters import ROUNDED_FOLDER, is_adapter
from entrenar.recipe.bit_budget import round_to_budget
from entrenar.recipe.models import model_folder
from entrenar.recipe.start import Observer


def open_base(config: FinetuneConfig, device: torch.device, *, is_resumed: bool) -> tuple[Llama, Tokenizer, Path]:
    """Return the model to fine-tune, its tokenizer and its folder.

    The model is not yet rounded if a bit budget is set, except on resume.

    Raises:
        ConfigError, DataError, FormatError: there is no such model, or not one for these options.
    """
    has_budget = config.quantize.bits is not None
    if has_budget and is_resumed:  # the original model is no longer needed
        folder = config.run_dir.resolve() / ROUNDED_FOLDER
    else:
        folder = model_folder(config.model).resolve()
        _check_method(config, folder)
    model = load_model(folder) if has_budget and not is_resumed else _load(config, folder, device)
    tokenizer = Tokenizer.load(folder)
    if not tokenizer.fits(model.config.vocab_size):
        raise DataError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}; "
            "they do not belong together"
        )
    return model, tokenizer, folder


def _check_method(config: FinetuneConfig, folder: Path) -> None:
    if is_adapter(folder):
        raise ConfigError(
            f"model must be a whole model, got the adapter {folder}; merge it first with `entrenar merge`"
        )
    if not is_quantized(folder):
        return
    if config.method != "qlora":
        raise ConfigError(
            f"method must be qlora for the model in four bits at {folder}, got {config.method}; "
            f"or widen it first with `entrenar convert {folder} DIR --to hf`"
        )
    if config.quantize.bits is not None:
        raise ConfigError(
            f"quantize.bits rounds plain weights, and those of {folder} are in few bits already; leave it out, or give "
            "the original model"
        )


def _load(config: FinetuneConfig, folder: Path, device: torch.device) -> Llama:
    model = load_model(
        folder,
        dtype=config.stored_dtype,
        device=device,
        quantize=config.method == "qlora",
        held=config.quantize,
    )
    model.set_compute_dtype(getattr(torch, config.compute_dtype))
    return model


def check_adapter(config: FinetuneConfig, model: Llama, folder: Path, *, is_resumed: bool) -> None:
    """Check that the adapter fits the base, before an earlier run is deleted or minutes are spent on rounding.

    Raises:
        ConfigError: an option names nothing in this model, or the adapter cannot start from it or be trained over it.
    """
    if config.method == "full":
        return
    find_targets(model, config.lora)
    saved = find_saved(model, config.lora).keys()
    rounded = [name for name in (EMBEDDING, HEAD) if name in saved]
    if config.quantize.bits is not None and rounded:
        raise ConfigError(
            f"modules_to_save: {rounded[0]} is held in few bits within quantize.bits, and those cannot be trained; "
            "leave one of the two out"
        )
    if config.lora.lora_init == "loftq" and not is_resumed and is_quantized(folder):
        raise ConfigError(
            "lora_init = loftq begins at what quantizing takes away, and needs a base that is quantized for this run; "
            f"{folder} is in few bits already: give the original model"
        )


def round_base(config: FinetuneConfig, bits: float, model: Llama, tokenizer: Tokenizer, observer: Observer) -> Source:
    """Round a plain model to the budget, for `keep_base`; nothing is written.

    Raises:
        ConfigError: the budget cannot be met; the message says the least possible.
        DataError: the calibration text cannot be used, or a weight is not finite.
    """
    targets = find_targets(model, config.lora) if config.lora.lora_init == "loftq" else ()
    adapters = Adapters({name: config.lora.rank_of(name) for name in targets}, config.quantize.loftq_turns)
    source = Source(model, tokenizer, "hf")
    source, budget = round_to_budget(source, bits, config.quantize.calibration, observer.on_stage, adapters)
    for line in budget.lines():
        observer.on_stage(line)
    return source


def keep_base(config: FinetuneConfig, rounded: Source, device: torch.device, observer: Observer) -> tuple[Llama, Path]:
    """Write a rounded base into the run's folder, and return it as read back from there.

    Raises:
        GateFailed: the written model does not pass its proof.
    """
    folder = config.run_dir.resolve() / ROUNDED_FOLDER
    report = convert(rounded, Target(folder, "nf-bits", can_overwrite=True))
    observer.on_stage(f"{folder}: KL {report.kl:.3g} nats a token from the original model")
    return _load(config, folder, device), folder


def put_adapter(config: FinetuneConfig, model: Llama, *, is_resumed: bool) -> None:
    """Freeze the model and give it a new adapter; on resume its initial values do not matter."""
    lora, original = config.lora, None
    if lora.lora_init == "loftq" and is_resumed:
        lora = lora.model_copy(update={"lora_init": "default"})
    elif lora.lora_init == "loftq":
        original = original_weights(model_folder(config.model))
    from_base(model, lora, torch.Generator().manual_seed(config.train.seed), original=original)


def original_weights(folder: Path) -> OriginalWeight | None:
    """Return a reader of a folder's unquantized projections, one at a time; None if they are quantized."""
    _, places, is_packed = open_folder(folder)

    def read(name: str) -> Tensor:
        path, entry = places[f"{name}.weight"][""]
        return TensorReader().read(path, f"{name}.weight", entry, entry.dtype)

    return None if is_packed else read
