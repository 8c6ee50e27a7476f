"""Fine-tuning: a model folder and rows in, a model or an adapter out.

    base -> tokenizer -> rows -> adapter -> trunk cache -> loader -> fit -> checkpoint

It is the road of pre-training with optional parts; the beginning, the loop, the checkpoints and the proof of a resume
are the same.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from torch import Tensor

from entrenar.config import FinetuneConfig
from entrenar.config_file import load_finetune_config
from entrenar.data import Batch, Example, SftLoader, SftState, Tokenizer, total_tokens
from entrenar.data.sft.alpaca import tokenizer_to_train
from entrenar.errors import ConfigError
from entrenar.interop import load_model
from entrenar.interop.hf_peft import BaseIdentity, identify_base
from entrenar.model import Llama, TokenBatch, batch_loss
from entrenar.model.batch_loss import BatchLoss
from entrenar.peft import TrunkCache, learning_rate_factors, memory_lines, trainable_table
from entrenar.recipe.adapters import read_weights, write_adapter
from entrenar.recipe.base import check_adapter, keep_base, open_base, put_adapter, round_base
from entrenar.recipe.finetune_figures import Figures, HeldOut
from entrenar.recipe.finetune_rows import QUARANTINE_FILE, Rows, read_rows
from entrenar.recipe.models import model_folder, write_model_around, write_model_folder
from entrenar.recipe.start import (
    Mode,
    Observer,
    Start,
    carry_out,
    check_unchanged,
    put_into_training,
    run_folder,
    start,
)
from entrenar.runs import RunFolder
from entrenar.scale import check_same
from entrenar.train import Outcome, Task


@dataclass(frozen=True)
class FinetuneReport:
    """The result of a run; `folder` holds the model, or the adapter in PEFT's format."""

    outcome: Outcome
    run_dir: Path
    folder: Path
    before: Figures | None
    after: Figures | None


@dataclass(frozen=True)
class _Parts:
    """The parts of a run; `base` is what an adapter is trained over, None if all weights are trained."""

    model: Llama
    tokenizer: Tokenizer
    rows: Rows
    base: BaseIdentity | None
    trunk: TrunkCache | None


def finetune(
    config: FinetuneConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_changes: bool = False,
    adds_time: bool = False,
    observer: Observer | None = None,
) -> FinetuneReport:
    """Fine-tune, or resume from the latest good checkpoint of the run.

    `overwrite` deletes an earlier run of the same name; `allow_changes` resumes although the config changed;
    `adds_time` counts max_time_s from the checkpoint that the run resumes from.

    Raises:
        ConfigError, DataError, FormatError, CheckpointError, TrainingHalted, MachineError.
    """
    return finetune_in(config, Mode(resume, overwrite, allow_changes, adds_time), observer or Observer())


def finetune_in(config: FinetuneConfig, mode: Mode, observer: Observer) -> FinetuneReport:
    """Fine-tune in a mode.

    Raises:
        ConfigError, DataError, FormatError, CheckpointError, TrainingHalted, MachineError; StepTaken if the mode is a
            replay.
    """
    started = start(config, mode)
    model, tokenizer, folder = open_base(started.config, started.device, is_resumed=started.is_resumed)
    check_adapter(started.config, model, folder, is_resumed=started.is_resumed)
    config = _dated(_shortened_to_context(started.config, model), tokenizer, started)
    started = dataclasses.replace(started, config=config)
    check_unchanged(started)
    _check_ranks(started)
    if mode.overwrite and started.world.is_writer:
        for stale in config.run_dir.glob(f"*{QUARANTINE_FILE}"):
            stale.unlink()
    rows = read_rows(config, tokenizer, observer)
    if any(example.is_chat for example in rows.train):
        tokenizer = tokenizer_to_train(tokenizer, config.sft.prompt_format)
    bits = None if started.is_resumed else config.quantize.bits
    if bits is not None and mode.replay is not None:
        raise ConfigError(
            "a step before the first checkpoint cannot be taken again with quantize.bits: no base is kept"
        )
    rounded = None if bits is None else round_base(config, bits, model, tokenizer, observer)
    with run_folder(started, kept=QUARANTINE_FILE):
        if rounded is not None:
            model, folder = keep_base(config, rounded, started.device, observer)
        base = _choose_trained(started, model, folder, observer)
        trunk = _open_trunk(config, model, tokenizer, rows, observer)
        try:
            return _train(started, _Parts(model, tokenizer, rows, base, trunk), observer)
        finally:
            if trunk is not None:
                trunk.close()


def _check_ranks(started: Start[FinetuneConfig]) -> None:
    """Refuse what one process must do alone.

    Raises:
        ConfigError: the base is to be rounded, or the trunk to be cached, by several ranks.
    """
    config = started.config
    if started.world.size == 1:
        return
    if config.quantize.bits is not None and not started.is_resumed:
        raise ConfigError(
            "quantize.bits must be left out for several ranks, because one process rounds the base; round it first "
            f"with `entrenar convert {config.model} DIR --to nf-bits --bits {config.quantize.bits}`"
        )
    if config.trunk.cache_trunk:
        raise ConfigError(
            "trunk.cache_trunk must be false for several ranks: one process writes the cache; leave it out"
        )


def _train(started: Start[FinetuneConfig], parts: _Parts, observer: Observer) -> FinetuneReport:
    config, model = started.config, parts.model
    held_out = HeldOut(config, model, parts.tokenizer, parts.rows)
    before = None
    if parts.rows.held_out and not started.is_resumed:
        observer.on_stage("Held-out figures before training")
        before = held_out.measure()
    loader = _loader(started, parts.rows.train)
    observer.on_stage(f"{len(parts.rows.train):,} examples in {loader.num_rows:,} rows, {config.sft.batching}")
    started = put_into_training(started, model, observer)
    loss = batch_loss(model, started.device, is_compiled=config.train.compile)
    if parts.trunk is not None:
        loss = _cached_loss(parts.trunk)

    def evaluate() -> dict[str, float]:
        figures = held_out.figures_by(loss)
        for line in held_out.sample_lines():
            observer.on_stage(line)
        return figures

    task: Task[Batch] = Task(
        module=model,
        batches=iter(loader),
        loss=loss,
        write_model=_writer(config, parts),
        write_index=_index_writer(parts),
        read_model=_reader(parts),
        saves_frozen=parts.base is None,
        evaluate=evaluate if parts.rows.held_out else None,
        micro_batches_per_epoch=loader.batches_per_epoch,
        lr_factors=learning_rate_factors(model, config.lora.lora_plus_ratio),
    )
    outcome = carry_out(started, task, observer)
    after = None if outcome.reason == "signal" else held_out.measure()
    return FinetuneReport(outcome, config.run_dir, model_folder(config.run_dir), before, after)


def _dated(config: FinetuneConfig, tokenizer: Tokenizer, started: Start[FinetuneConfig]) -> FinetuneConfig:
    """Fix the date that a chat template writes into rows, so that a run resumed on another day reads the same rows."""
    if config.sft.template_date is not None or not any("strftime_now" in t for t in tokenizer.chat_templates.values()):
        return config
    recorded = started.checkpoint.state["config"]["sft"].get("template_date") if started.checkpoint else None
    dated = config.sft.model_copy(update={"template_date": recorded or date.today().isoformat()})
    return config.model_copy(update={"sft": dated})


def _shortened_to_context(config: FinetuneConfig, model: Llama) -> FinetuneConfig:
    """Shorten rows to the model's context, unless the user set their length.

    Raises:
        ConfigError: the length that was set is beyond the context.
    """
    limit = model.config.context_length
    if config.sft.seq_len <= limit:
        return config
    if "seq_len" in config.sft.model_fields_set:
        raise ConfigError(f"sft.seq_len must be <= {limit}, the model's context, got {config.sft.seq_len}")
    return config.model_copy(update={"sft": config.sft.model_copy(update={"seq_len": limit})})


def _choose_trained(
    started: Start[FinetuneConfig], model: Llama, folder: Path, observer: Observer
) -> BaseIdentity | None:
    """Attach the adapter, if one is trained, and return the identity of its base."""
    config, base = started.config, None
    if config.method != "full":
        for line in memory_lines(model):
            observer.on_stage(line)
        base = identify_base(model, str(folder))
        put_adapter(config, model, is_resumed=started.is_resumed)
    for line in trainable_table(model).lines() if config.method != "full" else [_all_trained(model)]:
        observer.on_stage(line)
    return base


def _all_trained(model: Llama) -> str:
    return f"trained: all {trainable_table(model).trained_parameters:,} parameters"


def _open_trunk(
    config: FinetuneConfig, model: Llama, tokenizer: Tokenizer, rows: Rows, observer: Observer
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


def _loader(started: Start[FinetuneConfig], examples: Sequence[Example]) -> SftLoader:
    config, position, world = started.config, started.position, started.world
    loader = SftLoader(
        examples,
        batch_size=config.sft.batch_size,
        seq_len=config.sft.seq_len,
        seed=config.train.seed,
        batching=config.sft.batching,
        rank=world.rank,
        world_size=world.size,
        start=SftState.from_dict(position) if position else None,
    )
    check_same(world, {"data": loader.fingerprint})
    return loader


def _cached_loss(trunk: TrunkCache) -> BatchLoss:
    def loss(batch: TokenBatch) -> Tensor:
        return trunk.loss(batch.input_ids, batch.targets, documents=batch.documents)

    return loss


def _writer(config: FinetuneConfig, parts: _Parts) -> Callable[[Path, Mapping[str, Tensor]], None]:
    base = parts.base
    if base is None:
        return lambda folder, weights: write_model_folder(folder, parts.model, weights, parts.tokenizer)

    def write(folder: Path, weights: Mapping[str, Tensor]) -> None:
        write_adapter(folder, parts.model, config.lora, base, weights)
        parts.tokenizer.save(folder)

    return write


def _index_writer(parts: _Parts) -> Callable[[Path, Mapping[str, Tensor], Mapping[str, str]], None] | None:
    """Return the writer of what stands around weights that all ranks write; an adapter is small, and one file."""
    if parts.base is not None:
        return None
    return lambda folder, weights, files: write_model_around(folder, parts.model, weights, files, parts.tokenizer)


def _reader(parts: _Parts) -> Callable[[Path], Mapping[str, Tensor]]:
    base = parts.base
    if base is None:
        return lambda folder: dict(load_model(folder).named_parameters())
    return lambda folder: read_weights(folder, parts.model, base)


def resumable_finetune_config(run_dir: Path, flags: Mapping[str, str]) -> FinetuneConfig:
    """Read the config that a fine-tuning run was started with, with flags over it."""
    return load_finetune_config(RunFolder(run_dir).config, flags)
