"""The only composer of the training half: config in, trained run folder out.

    corpus -> tokenizer -> model -> loader -> fit -> checkpoint

Each part knows nothing of the others; this page is where they meet, in the order in which things happen.
"""

import logging
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from entrenar.config import RunConfig, load_config, to_toml
from entrenar.data import (
    Batch,
    Corpus,
    Loader,
    LoaderState,
    PrepareConfig,
    Progress,
    Tokenizer,
    check_same_tokenizer,
    prepare,
    validation_batches,
)
from entrenar.errors import CheckpointError, ConfigError, DataError
from entrenar.files import atomic_write
from entrenar.infer import Evaluation, evaluate
from entrenar.interop import load_model, save_model
from entrenar.model import Llama
from entrenar.ops import Documents, fastest_compute_dtype
from entrenar.train import (
    Checkpoint,
    Event,
    Outcome,
    Run,
    Settings,
    StepRecord,
    Task,
    check_same_config,
    fit,
    keep_freed_memory,
    latest_good,
    list_checkpoints,
)

CONFIG_FILE = "config.toml"
# Options that change how long a run goes on and what it reports, not what it computes.
_MAY_DIFFER = (
    "runs_dir", "train.max_steps", "train.epochs", "train.max_time_s", "train.eval_every", "train.log_every",
    "train.early_stop_patience", "train.tensorboard", "train.threads", "checkpoint.save_every", "checkpoint.keep_last",
    "checkpoint.keep_best", "data.max_eval_batches",
)  # fmt: skip
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Observer:
    """Who is told what happens: the command line prints it."""

    on_stage: Callable[[str], None] = lambda _: None
    on_record: Callable[[StepRecord], None] = lambda _: None
    on_event: Callable[[Event], None] = lambda _: None
    on_prepare: Callable[[Progress], None] = lambda _: None


@dataclass(frozen=True)
class TrainReport:
    """What a run came to."""

    outcome: Outcome
    run_dir: Path
    before: Evaluation | None
    after: Evaluation


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_changes: bool = False,
    observer: Observer | None = None,
) -> TrainReport:
    """Pre-train, or go on with the latest good checkpoint of the run.

    `overwrite` deletes an earlier run of the same name; `allow_changes` resumes although the config changed.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingHalted, MachineError.
    """
    observer = observer or Observer()
    use_machine(config)
    device = choose_device(config)
    checkpoint = _find_checkpoint(config, resume=resume, overwrite=overwrite)
    config = _settle_compute_dtype(config, device, checkpoint)
    if checkpoint is not None and not allow_changes:
        check_same_config(checkpoint.state["config"], _recorded(config), may_differ=_MAY_DIFFER)
    corpora = open_corpora(config, observer)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    atomic_write(config.run_dir / CONFIG_FILE, to_toml(config))
    tokenizer = corpora[0].tokenizer()
    model = _build_model(config, tokenizer, device, checkpoint, observer)
    evaluate_held_out = _held_out(config, model, corpora)
    before = None
    if checkpoint is None:
        observer.on_stage("Held-out loss before training")
        before = evaluate_held_out()
    loader = _loader(config, corpora, checkpoint)
    model.train()
    model.checkpointing = config.train.checkpointing
    task = Task(
        module=model,
        batches=iter(loader),
        loss=_loss(model, device, is_compiled=config.train.compile),
        write_model=lambda folder, weights: write_model_folder(folder, model, weights, tokenizer),
        read_model=lambda folder: dict(load_model(folder).named_parameters()),
        evaluate=lambda: _figures(evaluate_held_out()),
        micro_batches_per_epoch=max(1, round(loader.batches_per_epoch)),
    )
    settings = Settings(config.train, config.optim, config.schedule, config.checkpoint, config.monitor)
    observer.on_stage("Resuming" if checkpoint else "Training")
    run = Run(config.run_dir, _recorded(config), checkpoint)
    outcome = fit(task, settings, run, on_record=observer.on_record, on_event=observer.on_event)
    model.eval()
    return TrainReport(outcome, config.run_dir, before, evaluate_held_out())


def use_machine(config: RunConfig) -> None:
    """Set threads, allocator and seeds, which hold for the whole process."""
    random.seed(config.train.seed)
    np.random.seed(config.train.seed % 2**32)
    torch.manual_seed(config.train.seed)
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    keep_freed_memory()


def choose_device(config: RunConfig) -> torch.device:
    """Return the device that the config names, or the best there is.

    Raises:
        ConfigError: the machine has no such device.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device must be one this machine has, got \'cuda\'; set device = "cpu" or "auto"')
    return torch.device(config.device)


def open_corpora(config: RunConfig, observer: Observer) -> list[Corpus]:
    """Open the corpora; prepare the first from `data.sources` if it does not exist yet.

    Raises:
        DataError: a corpus is missing or damaged.
    """
    first = config.data.corpus[0]
    if config.data.sources and not first.exists():
        observer.on_stage(f"Preparing {first} from {', '.join(config.data.sources)}")
        options = PrepareConfig(vocab_size=config.model.vocab_size)
        prepare(config.data.sources, first, options, tokenizer=config.data.tokenizer, progress=observer.on_prepare)
    observer.on_stage("Checking the corpus")
    return [Corpus.open(folder) for folder in config.data.corpus]


def write_model_folder(folder: Path, model: Llama, weights: Mapping[str, Tensor], tokenizer: Tokenizer) -> None:
    """Write a Hugging Face model folder with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_model(folder, model.config, weights)
    tokenizer.save(folder)


def _find_checkpoint(config: RunConfig, *, resume: bool, overwrite: bool) -> Checkpoint | None:
    run_dir, checkpoints = config.run_dir, Run(config.run_dir, {}).checkpoints
    if resume:
        if not run_dir.is_dir():
            raise CheckpointError(f"there is no run at {run_dir} to resume; start it without --resume")
        return latest_good(checkpoints)
    if list_checkpoints(checkpoints):
        if not overwrite:
            raise ConfigError(
                f"{run_dir} already holds a run; go on with it by --resume, replace it by --overwrite, "
                "or choose another --name"
            )
        shutil.rmtree(run_dir)
    return None


def _settle_compute_dtype(config: RunConfig, device: torch.device, checkpoint: Checkpoint | None) -> RunConfig:
    """Replace "auto" by the dtype that is fastest here, or by that of the run which goes on.

    Another dtype would change the last bits, so it is measured once in the life of a run and recorded.
    """
    if config.compute_dtype != "auto":
        return config
    if checkpoint is not None:
        settled = checkpoint.state["config"]["compute_dtype"]
    else:
        fastest = fastest_compute_dtype(getattr(torch, config.train.precision), device)
        settled = str(fastest).removeprefix("torch.")
    return config.model_copy(update={"compute_dtype": settled})


def _recorded(config: RunConfig) -> dict[str, Any]:
    recorded: dict[str, Any] = config.model_dump(mode="json", exclude={"preset"})
    return recorded


def _build_model(
    config: RunConfig, tokenizer: Tokenizer, device: torch.device, checkpoint: Checkpoint | None, observer: Observer
) -> Llama:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"the corpus' tokenizer has {tokenizer.vocab_size} tokens, model.vocab_size is {config.model.vocab_size}; "
            f"set model.vocab_size = {tokenizer.vocab_size} or prepare the corpus with a smaller tokenizer"
        )
    tokens = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    own = config.model.model_dump(exclude_unset=True)
    with torch.device("meta"):
        model = Llama(config.model.model_copy(update={key: v for key, v in tokens.items() if own.get(key) is None}))
    model.to_empty(device=device)
    if checkpoint is None:
        model.init_weights(torch.Generator().manual_seed(config.train.seed))
    model.set_compute_dtype(getattr(torch, config.compute_dtype))
    trained = sum(parameter.numel() for parameter in model.parameters())
    observer.on_stage(f"Model: {trained:,} parameters, all trained, on {device}")
    return model


def _loader(config: RunConfig, corpora: list[Corpus], checkpoint: Checkpoint | None) -> Loader:
    position = checkpoint.loader_state if checkpoint else None
    return Loader(
        *corpora,
        batch_size=config.data.batch_size,
        seq_len=config.data.seq_len,
        seed=config.train.seed,
        weights=config.data.weights,
        mask_documents=config.data.mask_documents,
        start=LoaderState.from_dict(position) if position else None,
    )


def _loss(model: Llama, device: torch.device, *, is_compiled: bool) -> Callable[[Batch], Tensor]:
    loss_of: Callable[..., Tensor] = torch.compile(model.loss) if is_compiled else model.loss

    def loss(batch: Batch) -> Tensor:
        moved = batch.to(device)
        documents = None if moved.document_ids is None else Documents.from_ids(moved.document_ids)
        return loss_of(moved.input_ids, moved.targets, documents=documents)

    return loss


def _held_out(config: RunConfig, model: Llama, corpora: list[Corpus]) -> Callable[[], Evaluation]:
    def measure() -> Evaluation:
        each = (
            validation_batches(
                corpus,
                batch_size=config.data.batch_size,
                seq_len=config.data.seq_len,
                mask_documents=config.data.mask_documents,
            )
            for corpus in corpora
        )
        batches = (islice(one, config.data.max_eval_batches) for one in each)
        return evaluate(model, chain.from_iterable(batches))

    return measure


def _figures(evaluation: Evaluation) -> dict[str, float]:
    figures = {"loss": evaluation.loss, "perplexity": evaluation.perplexity}
    if evaluation.bits_per_byte is not None:
        figures["bits_per_byte"] = evaluation.bits_per_byte
    return figures


def model_folder(path: Path) -> Path:
    """Return the model folder that `path` means: itself, a checkpoint's, or that of a run's latest good checkpoint.

    Raises:
        DataError: there is no model at `path`.
    """
    if (path / "config.json").is_file():
        return path
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "checkpoints").is_dir():
        return latest_good(path / "checkpoints").model
    raise DataError(f"{path} is neither a model folder (config.json), nor a checkpoint, nor a run with checkpoints")


def open_model(path: Path, *, dtype: torch.dtype | None = None) -> tuple[Llama, Tokenizer]:
    """Load model and tokenizer from a model folder, a checkpoint or a run."""
    folder = model_folder(path)
    model = load_model(folder, dtype=dtype)
    return model, Tokenizer.load(folder)


def evaluate_model(path: Path, corpus: Path, *, batch_size: int, seq_len: int | None = None) -> Evaluation:
    """Measure a model on a corpus' held-out split.

    Raises:
        DataError: the corpus' tokenizer is not the model's.
    """
    model, tokenizer = open_model(path)
    opened = Corpus.open(corpus)
    check_same_tokenizer([opened], tokenizer.hash, f"model {path}")
    length = min(seq_len or model.config.max_seq_len, model.config.max_seq_len)
    return evaluate(model, validation_batches(opened, batch_size=batch_size, seq_len=length))


def resumable_config(run_dir: Path, flags: Mapping[str, str]) -> RunConfig:
    """Read the config that a run was started with, with flags over it."""
    return load_config(run_dir / CONFIG_FILE, flags)
