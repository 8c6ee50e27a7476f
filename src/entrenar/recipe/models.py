"""Find, load and write models and adapters, whatever kind of folder a user names."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from entrenar.data import Corpus, Tokenizer, check_same_tokenizer, validation_batches
from entrenar.errors import ConfigError, DataError
from entrenar.infer import Evaluation, evaluate
from entrenar.interop import load_model, read_config, save_model
from entrenar.interop.hf import save_around
from entrenar.interop.source import MODEL_BIN, detect, open_source
from entrenar.model import Llama
from entrenar.recipe.adapters import base_of, is_adapter, use_adapter
from entrenar.runs import MODEL_FOLDER, RunFolder
from entrenar.train import latest_good


def write_model_folder(folder: Path, model: Llama, weights: Mapping[str, Tensor], tokenizer: Tokenizer) -> None:
    """Write a Hugging Face model folder with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, model.config, weights, generation=model.generation)
    tokenizer.save(folder)


def write_model_around(
    folder: Path, model: Llama, weights: Mapping[str, Tensor], files: Mapping[str, str], tokenizer: Tokenizer
) -> None:
    """Write what belongs to a model folder with its tokenizer besides the `files` of weights."""
    save_around(folder, model.config, weights, files, generation=model.generation)
    tokenizer.save(folder)


def model_folder(path: Path) -> Path:
    """Return the model or adapter folder that `path` names: itself, a checkpoint's, or the latest good one of a run.

    Raises:
        DataError: `path` holds no model, or is a single file.
    """
    if _is_llama2c_or_gguf(path):
        detect(path)  # a pickle or a damaged file is named as such: no conversion would take it
        raise DataError(
            f"{path} must be a model folder, got a single file; convert it: entrenar convert {path} DIR --to hf"
        )
    for folder in (path, path / MODEL_FOLDER):
        if (folder / "config.json").is_file() or is_adapter(folder):
            return folder
    if (checkpoints := RunFolder(path).checkpoints).is_dir():
        return latest_good(checkpoints).model
    if not path.exists():
        raise DataError(f"{path} does not exist{_download_hint(path)}")
    raise DataError(f"{path} is neither a model folder (config.json), nor a checkpoint, nor a run with checkpoints")


def _download_hint(path: Path) -> str:
    """Return how to get a model whose name on the Hugging Face hub was given instead of a folder."""
    if path.is_absolute() or len(path.parts) != 2 or path.parts[0] in (".", "..", "runs"):
        return ""
    return (
        "; if it is a name on the Hugging Face hub, download it with huggingface_hub's command and give the folder: "
        f"hf download {path} --local-dir {path.name}"
    )


def _is_llama2c_or_gguf(path: Path) -> bool:
    return path.is_file() or ((path / MODEL_BIN).is_file() and not (path / "config.json").is_file())


def open_model(path: Path, *, dtype: torch.dtype | None = None) -> tuple[Llama, Tokenizer]:
    """Load model and tokenizer from a model folder, a checkpoint, a run, a GGUF file or one of llama2.c's.

    An adapter brings its base along, quantized if it was trained over a quantized base, and in the dtype that it was
    trained over unless another is asked for.

    Raises:
        DataError: `path` holds no model, or the model has no tokenizer.
        FormatError: it is damaged, or an adapter's base has changed.
    """
    if _is_llama2c_or_gguf(path):
        source = open_source(path)
        if source.tokenizer is None:
            raise DataError(
                f"{path} ({source.format}) comes without a tokenizer; add one: "
                f"entrenar convert {path} DIR --to hf --tokenizer FILE"
            )
        return source.model if dtype is None else source.model.to(dtype), source.tokenizer
    folder = model_folder(path)
    if not is_adapter(folder):
        read_config(folder)  # another family is named as such, with or without a tokenizer
        tokenizer = Tokenizer.load(folder)  # then: it takes no time, and a model may take minutes
        return load_model(folder, dtype=dtype), tokenizer
    base, identity = base_of(folder)
    dtype = dtype or identity.plain_dtype
    model = load_model(base, dtype=dtype, quantize=identity.is_quantized, held=identity.held)
    use_adapter(folder, model)
    # A fine-tuning run saves the chat template that it trained with next to the adapter.
    has_own = (folder / "tokenizer.json").is_file()
    return model, Tokenizer.load(folder if has_own else base)


def evaluate_model(path: Path, corpus: Path, *, batch_size: int, seq_len: int | None = None) -> Evaluation:
    """Measure a model on a corpus' held-out split.

    Raises:
        ConfigError: seq_len is longer than the model's context.
        DataError: the corpus' tokenizer is not the model's.
    """
    model, tokenizer = open_model(path)
    opened = Corpus.open(corpus)
    check_same_tokenizer([opened], tokenizer.hash, f"model {path}")
    length = seq_len or model.config.max_seq_len
    if length > model.config.max_seq_len:
        raise ConfigError(f"seq_len must be <= {model.config.max_seq_len}, the model's context, got {length}")
    return evaluate(model, validation_batches(opened, batch_size=batch_size, seq_len=length))
