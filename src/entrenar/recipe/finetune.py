"""Fine-tuning: a model folder and rows in, a model or an adapter out.

    base -> tokenizer -> rows -> adapter -> trunk cache -> loader -> fit -> checkpoint

It is the road of pre-training with optional parts; the loop, the checkpoints and the proof of a resume are the same.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from entrenar.config import FinetuneConfig, changeable
from entrenar.config_file import load_finetune_config
from entrenar.data import (
    Batch,
    Example,
    SftLoader,
    SftState,
    Tokenizer,
    accept,
    held_out_batches,
    read_examples,
    split,
    total_tokens,
)
from entrenar.errors import ConfigError
from entrenar.infer import (
    Evaluation,
    Question,
    accuracy,
    evaluate,
    exact_match,
    token_hits,
    write_answers,
)
from entrenar.interop import load_model
from entrenar.interop.hf_peft import BaseIdentity, identify_base
from entrenar.model import Llama, TokenBatch, batch_loss
from entrenar.model.batch_loss import BatchLoss
from entrenar.ops import Documents
from entrenar.peft import TrunkCache, learning_rate_factors, memory_lines, trainable_table
from entrenar.planning import settle_compute_dtype
from entrenar.recipe.adapters import read_weights, write_adapter
from entrenar.recipe.base import check_adapter, keep_base, open_base, put_adapter, round_base
from entrenar.recipe.models import model_folder, write_model_folder
from entrenar.recipe.run import (
    Observer,
    choose_device,
    find_checkpoint,
    open_run_folder,
    recorded,
    recorded_compute_dtype,
)
from entrenar.runs import RunFolder
from entrenar.train import Checkpoint, Outcome, Run, Settings, Task, check_same_config, fit, prepare_process

QUARANTINE_FILE = "quarantine.jsonl"


@dataclass(frozen=True)
class Figures:
    """What the model makes of the held-out rows, and of the task if there is one.

    Attributes:
        held_out: loss and perplexity.
        token_accuracy: the share of held-out answer tokens that are the likeliest ones.
        task: the share of the task's questions that were answered right.
    """

    held_out: Evaluation
    token_accuracy: float
    task: float | None


@dataclass(frozen=True)
class FinetuneReport:
    """What a run came to; `folder` holds the model, or the adapter in PEFT's format."""

    outcome: Outcome
    run_dir: Path
    folder: Path
    before: Figures | None
    after: Figures | None


@dataclass(frozen=True)
class _Rows:
    """The examples of a run."""

    train: list[Example]
    held_out: list[Example]
    questions: list[Question]


def finetune(
    config: FinetuneConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_changes: bool = False,
    observer: Observer | None = None,
) -> FinetuneReport:
    """Fine-tune, or go on with the latest good checkpoint of the run.

    `overwrite` deletes an earlier run of the same name; `allow_changes` resumes although the config changed.

    Raises:
        ConfigError, DataError, FormatError, CheckpointError, TrainingHalted, MachineError.
    """
    observer = observer or Observer()
    prepare_process(config.train)
    device = choose_device(config)
    checkpoint = find_checkpoint(config.run_dir, resume=resume, overwrite=overwrite)
    config = settle_compute_dtype(config, device, recorded_compute_dtype(checkpoint))
    model, tokenizer, folder = open_base(config, device, is_resumed=checkpoint is not None)
    check_adapter(config, model, folder, is_resumed=checkpoint is not None)
    config = _fit_context(config, model)
    if checkpoint is not None and not allow_changes:
        check_same_config(checkpoint.state["config"], recorded(config), may_differ=changeable(FinetuneConfig))
    if overwrite:
        for stale in config.run_dir.glob(f"*{QUARANTINE_FILE}"):
            stale.unlink()
    rows = _read_rows(config, tokenizer, observer)
    bits = config.quantize.bits if checkpoint is None else None
    rounded = None if bits is None else round_base(config, bits, model, tokenizer, observer)
    open_run_folder(config, overwrite=overwrite, kept=QUARANTINE_FILE)
    if rounded is not None:
        model, folder = keep_base(config, rounded, device, observer)
    base = _choose_trained(config, model, folder, observer, is_resumed=checkpoint is not None)
    trunk = _open_trunk(config, model, tokenizer, rows, observer)
    try:
        return _train(config, _Parts(model, tokenizer, rows, base, trunk, device), checkpoint, observer)
    finally:
        if trunk is not None:
            trunk.close()


@dataclass(frozen=True)
class _Parts:
    """What is put together."""

    model: Llama
    tokenizer: Tokenizer
    rows: _Rows
    base: BaseIdentity | None
    trunk: TrunkCache | None
    device: torch.device


def _train(config: FinetuneConfig, parts: _Parts, checkpoint: Checkpoint | None, observer: Observer) -> FinetuneReport:
    model = parts.model
    before = None
    if checkpoint is None and parts.rows.held_out:
        observer.on_stage("Held-out figures before training")
        before = _measure(config, parts)
    loader = _loader(config, parts.rows.train, checkpoint)
    observer.on_stage(f"{len(parts.rows.train):,} examples in {loader.num_rows:,} rows, {config.sft.batching}")
    model.train()
    model.checkpointing = config.train.checkpointing
    if config.train.stream_base:
        model.stream_base()
    loss = batch_loss(model, parts.device, is_compiled=config.train.compile)
    if parts.trunk is not None:
        loss = _cached_loss(parts.trunk, parts.device)
    task = Task(
        module=model,
        batches=iter(loader),
        loss=loss,
        write_model=_writer(config, parts),
        read_model=_reader(parts),
        evaluate=_evaluator(config, parts, loss, observer) if parts.rows.held_out else None,
        micro_batches_per_epoch=loader.batches_per_epoch,
        lr_factors=learning_rate_factors(model, config.lora.lora_plus_ratio),
    )
    settings = Settings(config.train, config.optim, config.schedule, config.checkpoint, config.monitor)
    observer.on_stage("Resuming" if checkpoint else "Training")
    run = Run(config.run_dir, recorded(config), checkpoint)
    outcome = fit(task, settings, run, on_record=observer.on_record, on_event=observer.on_event)
    model.eval()
    after = _measure(config, parts) if parts.rows.held_out else None
    return FinetuneReport(outcome, config.run_dir, model_folder(config.run_dir), before, after)


def _fit_context(config: FinetuneConfig, model: Llama) -> FinetuneConfig:
    """Shorten rows to the model's context, unless the user set their length."""
    limit = model.config.context_length
    if config.sft.seq_len <= limit:
        return config
    if "seq_len" in config.sft.model_fields_set:
        raise ConfigError(f"sft.seq_len must be <= {limit}, the model's context, got {config.sft.seq_len}")
    return config.model_copy(update={"sft": config.sft.model_copy(update={"seq_len": limit})})


def _read_rows(config: FinetuneConfig, tokenizer: Tokenizer, observer: Observer) -> _Rows:
    """Read training rows, held-out rows and the task's questions, and say what was found.

    Raises: DataError.
    """
    sft, task = config.sft, config.task
    train = _examples(config, sft.data, tokenizer, observer, QUARANTINE_FILE)
    if sft.eval_data:
        held_out = _examples(config, sft.eval_data, tokenizer, observer, f"eval-{QUARANTINE_FILE}")
    else:
        train, held_out = split(train, sft.eval_fraction, config.train.seed)
    asked: list[Example] = []
    if task.task_data is not None:
        asked = _examples(config, (task.task_data,), tokenizer, observer, f"task-{QUARANTINE_FILE}")
    questions = [question_of(example) for example in asked[: task.max_task_examples]]
    return _Rows(train, held_out[: sft.max_eval_examples], questions)


def _examples(
    config: FinetuneConfig, files: Sequence[Path], tokenizer: Tokenizer, observer: Observer, quarantine: str
) -> list[Example]:
    found = read_examples(files, tokenizer, config.sft)
    for note in found.notes(config.sft):
        observer.on_stage(f"{', '.join(map(str, files))}: {note}")
    return accept(found, config.sft, config.run_dir / quarantine)


def question_of(example: Example) -> Question:
    """Return the last answer of an example and what stands before it."""
    start = example.answer_start
    return Question(tuple(example.ids[:start].tolist()), tuple(example.ids[start:].tolist()))


def _choose_trained(
    config: FinetuneConfig, model: Llama, folder: Path, observer: Observer, *, is_resumed: bool
) -> BaseIdentity | None:
    """Attach the adapter, if it is one that is trained; return what its base is."""
    base = None
    if config.method != "full":
        for line in memory_lines(model):
            observer.on_stage(line)
        base = identify_base(model, str(folder))
        put_adapter(config, model, is_resumed=is_resumed)
    for line in trainable_table(model).lines() if config.method != "full" else [_all_trained(model)]:
        observer.on_stage(line)
    return base


def _all_trained(model: Llama) -> str:
    return f"trained: all {trainable_table(model).trained_parameters:,} parameters"


def _open_trunk(
    config: FinetuneConfig, model: Llama, tokenizer: Tokenizer, rows: _Rows, observer: Observer
) -> TrunkCache | None:
    if not config.trunk.cache_trunk:
        return None
    tokens = total_tokens(rows.train) + total_tokens(rows.held_out)
    cache = TrunkCache(
        model, config.trunk, tokenizer_hash=tokenizer.hash, expected_tokens=tokens, on_event=observer.on_stage
    )
    observer.on_stage(
        f"Trunk cache {config.trunk.trunk_dir}: layers 0 … {cache.cut - 1} are computed once for each document; "
        f"{len(cache.store):,} are there"
    )
    return cache


def _loader(config: FinetuneConfig, examples: Sequence[Example], checkpoint: Checkpoint | None) -> SftLoader:
    position = checkpoint.loader_state if checkpoint else None
    return SftLoader(
        examples,
        batch_size=config.sft.batch_size,
        seq_len=config.sft.seq_len,
        seed=config.train.seed,
        batching=config.sft.batching,
        start=SftState.from_dict(position) if position else None,
    )


def _cached_loss(trunk: TrunkCache, device: torch.device) -> BatchLoss:
    def loss(batch: TokenBatch) -> Tensor:
        moved = batch.to(device)
        documents = None if moved.document_ids is None else Documents.from_ids(moved.document_ids)
        return trunk.loss(moved.input_ids, moved.targets, documents=documents)

    return loss


def _writer(config: FinetuneConfig, parts: _Parts) -> Callable[[Path, Mapping[str, Tensor]], None]:
    base = parts.base
    if base is None:
        return lambda folder, weights: write_model_folder(folder, parts.model, weights, parts.tokenizer)
    return lambda folder, _: write_adapter(folder, parts.model, config.lora, base)


def _reader(parts: _Parts) -> Callable[[Path], Mapping[str, Tensor]]:
    base = parts.base
    if base is None:
        return lambda folder: dict(load_model(folder).named_parameters())
    return lambda folder: read_weights(folder, parts.model, base)


def _evaluator(
    config: FinetuneConfig, parts: _Parts, loss: BatchLoss, observer: Observer
) -> Callable[[], dict[str, float]]:
    """Return the evaluation during training: held-out loss (by the cache, if there is one), task, sample answers."""

    def measure() -> dict[str, float]:
        total, targets = 0.0, 0
        for batch in _held_out(config, parts.rows):
            total += float(loss(batch))
            targets += batch.num_targets
        figures = {"loss": total / targets}
        share = _task_share(config, parts)
        if share is not None:
            figures[config.task.metric] = share
        for line in _samples(config, parts):
            observer.on_stage(line)
        return figures

    return measure


def _held_out(config: FinetuneConfig, rows: _Rows) -> list[Batch]:
    return list(held_out_batches(rows.held_out, batch_size=config.sft.batch_size, seq_len=config.sft.seq_len))


def _measure(config: FinetuneConfig, parts: _Parts) -> Figures:
    """Return every figure, computed the long way."""
    batches = _held_out(config, parts.rows)
    parts.model.eval()
    evaluation = evaluate(parts.model, batches)
    hits = list(token_hits(parts.model, batches))
    token_accuracy = sum(right for right, _ in hits) / sum(asked for _, asked in hits)
    return Figures(evaluation, token_accuracy, _task_share(config, parts))


def _task_share(config: FinetuneConfig, parts: _Parts) -> float | None:
    questions = parts.rows.questions
    if not questions:
        return None
    if config.task.metric == "accuracy":
        right = accuracy(parts.model, questions)
    else:
        right = exact_match(parts.model, parts.tokenizer, questions, config.task.max_answer_tokens)
    return sum(right) / len(right)


def _samples(config: FinetuneConfig, parts: _Parts) -> list[str]:
    limit = parts.model.config.context_length
    examples = [example for example in parts.rows.held_out if 0 < example.answer_start < limit]
    questions = [question_of(example) for example in examples[: config.task.sample_answers]]
    prompts = [question.prompt for question in questions]
    lines = []
    answers = write_answers(parts.model, parts.tokenizer, prompts, config.task.max_answer_tokens)
    for question, answer in zip(questions, answers, strict=True):
        asked, wanted = (parts.tokenizer.decode(ids) for ids in (question.prompt, question.answer))
        lines += [
            f"  asked  … {asked[-80:]!r}",
            f"  wanted   {wanted.strip()!r:.100}",
            f"  answer → {answer.strip()!r:.100}",
        ]
    return lines


def resumable_finetune_config(run_dir: Path, flags: Mapping[str, str]) -> FinetuneConfig:
    """Read the config that a fine-tuning run was started with, with flags over it."""
    return load_finetune_config(RunFolder(run_dir).config, flags)
