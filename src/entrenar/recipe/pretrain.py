"""Pre-training: config in, trained run folder out.

    corpus -> tokenizer -> model -> loader -> fit -> checkpoint

Each part knows nothing of the others; this page is where they meet, in the order in which things happen.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import torch

from entrenar.config import RunConfig
from entrenar.config_file import load_config
from entrenar.data import (
    Batch,
    Corpus,
    Loader,
    LoaderState,
    PrepareConfig,
    Tokenizer,
    prepare,
    validation_batches,
)
from entrenar.errors import ConfigError, DataError
from entrenar.infer import Evaluation, evaluate
from entrenar.interop import load_model
from entrenar.interop.assemble import give_storage
from entrenar.model import Llama, LlamaConfig, batch_loss
from entrenar.planning import check_room, memory_limit, sized
from entrenar.recipe.models import write_model_around, write_model_folder
from entrenar.recipe.start import (
    Mode,
    Observer,
    Start,
    carry_out,
    check_unchanged,
    find_checkpoint,
    put_into_training,
    run_folder,
    start,
)
from entrenar.runs import RunFolder
from entrenar.scale import check_same
from entrenar.train import Outcome, Task

_NOTHING_HELD_OUT = "No held-out text (prepared with val_fraction 0), so no held-out loss and no best checkpoint"


@dataclass(frozen=True)
class TrainReport:
    """The result of a run; one that a signal ended skips the final evaluation."""

    outcome: Outcome
    run_dir: Path
    before: Evaluation | None
    after: Evaluation | None


def train(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    allow_changes: bool = False,
    adds_time: bool = False,
    observer: Observer | None = None,
) -> TrainReport:
    """Pre-train, or resume from the latest good checkpoint of the run.

    `overwrite` deletes an earlier run of the same name; `allow_changes` resumes although the config changed;
    `adds_time` counts max_time_s from the checkpoint that the run resumes from.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingHalted, MachineError.
    """
    return train_in(config, Mode(resume, overwrite, allow_changes, adds_time), observer or Observer())


def train_in(config: RunConfig, mode: Mode, observer: Observer) -> TrainReport:
    """Pre-train in a mode.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingHalted, MachineError; StepTaken if the mode is a replay.
    """
    ready = _ready(config, mode, observer)
    started, config = ready.started, ready.started.config
    model = _build_model(started, ready.tokenizer, observer)
    with run_folder(started):
        held_out = _HeldOut(config, model, ready.corpora)
        before = None
        if not started.is_resumed:
            observer.on_stage("Held-out loss before training" if held_out.is_there else _NOTHING_HELD_OUT)
            before = held_out.measure() if held_out.is_there else None
            observer.on_look(model, ready.tokenizer)
        started = put_into_training(started, model, observer)
        ready = replace(ready, started=started)
        outcome = carry_out(started, _task(ready, model, held_out, observer), observer)
        return TrainReport(outcome, config.run_dir, before, held_out.after(outcome))


def check(
    config: RunConfig, *, resume: bool = False, overwrite: bool = False, allow_changes: bool = False
) -> list[Corpus]:
    """Check everything that `train` checks before it builds the model, change nothing, and return the corpora.

    The list is empty if the first corpus has yet to be prepared from its sources.

    Raises:
        ConfigError, DataError, CheckpointError.
    """
    mode = Mode(resume, overwrite, allow_changes)
    if _is_to_be_prepared(config):
        find_checkpoint(config.run_dir, mode)
        return []
    return _ready(config, mode, Observer()).corpora


@dataclass(frozen=True)
class _Ready:
    """A run whose parts are known to belong together, before anything is made or replaced."""

    started: Start[RunConfig]
    corpora: list[Corpus]
    tokenizer: Tokenizer
    loader: Loader


def _task(ready: _Ready, model: Llama, held_out: "_HeldOut", observer: Observer) -> Task[Batch]:
    """Put together what the training loop is handed."""
    started = ready.started

    def evaluate() -> dict[str, float]:
        return {**figures_of(held_out.measure()), **observer.on_look(model, ready.tokenizer)}

    return Task(
        module=model,
        batches=iter(ready.loader),
        loss=batch_loss(model, started.device, is_compiled=started.config.train.compile),
        write_model=lambda folder, weights: write_model_folder(folder, model, weights, ready.tokenizer),
        write_index=lambda folder, weights, files: write_model_around(folder, model, weights, files, ready.tokenizer),
        read_model=lambda folder: dict(load_model(folder).named_parameters()),
        evaluate=evaluate if held_out.is_there else None,
        micro_batches_per_epoch=max(1, round(ready.loader.batches_per_epoch)),
    )


def _ready(config: RunConfig, mode: Mode, observer: Observer) -> _Ready:
    started = start(config, mode)
    if started.is_resumed:
        started = replace(started, config=_with_recorded_model(started))
    check_unchanged(started)
    if started.world.size > 1 and _is_to_be_prepared(started.config):
        raise ConfigError(
            f"{started.config.data.corpus[0]} must be prepared before several ranks train on it; run `entrenar prepare`"
        )
    corpora = open_corpora(started.config, observer)
    tokenizer = corpora[0].tokenizer()
    if not started.is_resumed:
        started = replace(started, config=_sized(started, corpora, tokenizer.vocab_size))
    config = started.config
    check_room(config)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"the corpus' tokenizer has {tokenizer.vocab_size} tokens, model.vocab_size is {config.model.vocab_size}; "
            f"set model.vocab_size = {tokenizer.vocab_size} or prepare the corpus with a smaller tokenizer"
        )
    if config.train.early_stop_patience is not None and not any(corpus.has_validation for corpus in corpora):
        raise DataError(
            "train.early_stop_patience needs held-out text, but the corpora were prepared with val_fraction 0; "
            "prepare them with more (--val-fraction), or leave early_stop_patience out"
        )
    return _Ready(started, corpora, tokenizer, _loader(started, corpora))


def _with_recorded_model(started: Start[RunConfig]) -> RunConfig:
    """Take the fields of [model] that the config leaves open from the checkpoint."""
    config = started.config
    if started.checkpoint is None or config.preset is not None:
        return config
    own = config.model.model_dump(mode="json", exclude_unset=True)
    return config.model_copy(update={"model": LlamaConfig(**(started.checkpoint.state["config"]["model"] | own))})


def _sized(started: Start[RunConfig], corpora: list[Corpus], vocab_size: int) -> RunConfig:
    tokens = sum(corpus.manifest.splits["train"].tokens for corpus in corpora)
    room_bytes = started.world.broadcast(memory_limit().size_bytes) // started.world.size
    return sized(started.config, vocab_size=vocab_size, tokens=tokens, room_bytes=room_bytes)


def _is_to_be_prepared(config: RunConfig) -> bool:
    return bool(config.data.sources) and not config.data.corpus[0].exists()


def open_corpora(config: RunConfig, observer: Observer) -> list[Corpus]:
    """Open the corpora; prepare the first from `data.sources` if it does not exist yet.

    Raises:
        DataError: a corpus is missing or damaged.
    """
    first = config.data.corpus[0]
    if _is_to_be_prepared(config):
        observer.on_stage(f"Preparing {first} from {', '.join(config.data.sources)}")
        is_given = config.preset is not None or "vocab_size" in config.model.model_fields_set
        options = PrepareConfig(vocab_size=config.model.vocab_size) if is_given else PrepareConfig()
        prepare(config.data.sources, first, options, tokenizer=config.data.tokenizer, progress=observer.on_prepare)
    observer.on_stage("Checking the corpus")
    return [Corpus.open(folder) for folder in config.data.corpus]


def _build_model(started: Start[RunConfig], tokenizer: Tokenizer, observer: Observer) -> Llama:
    config = started.config
    tokens = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    own = config.model.model_dump(exclude_unset=True)
    with torch.device("meta"):
        model = Llama(config.model.model_copy(update={key: v for key, v in tokens.items() if own.get(key) is None}))
    give_storage(model, started.device)
    if not started.is_resumed:
        model.init_weights(torch.Generator().manual_seed(config.train.seed))
    model.set_compute_dtype(getattr(torch, config.compute_dtype))
    trained = sum(parameter.numel() for parameter in model.parameters())
    observer.on_stage(f"Model: {trained:,} parameters, all trained, on {started.device}")
    return model


def _loader(started: Start[RunConfig], corpora: list[Corpus]) -> Loader:
    config, position, world = started.config, started.position, started.world
    loader = Loader(
        *corpora,
        batch_size=config.data.batch_size,
        seq_len=config.data.seq_len,
        seed=config.train.seed,
        weights=config.data.weights,
        rank=world.rank,
        world_size=world.size,
        mask_documents=config.data.mask_documents,
        start=LoaderState.from_dict(position) if position else None,
    )
    check_same(world, {"data": loader.fingerprint})
    return loader


class _HeldOut:
    """Measures the model on the held-out text of `corpora`, those that have some, and remembers the last figures."""

    def __init__(self, config: RunConfig, model: Llama, corpora: list[Corpus]) -> None:
        self._config, self._model = config, model
        self._corpora = [corpus for corpus in corpora if corpus.has_validation]
        self._last: Evaluation | None = None

    @property
    def is_there(self) -> bool:
        """Return whether any corpus has held-out text."""
        return bool(self._corpora)

    def measure(self) -> Evaluation:
        """Measure now."""
        data = self._config.data
        each = (
            validation_batches(
                corpus, batch_size=data.batch_size, seq_len=data.seq_len, mask_documents=data.mask_documents
            )
            for corpus in self._corpora
        )
        batches = (islice(one, data.max_eval_batches) for one in each)
        self._last = evaluate(self._model, chain.from_iterable(batches))
        return self._last

    def after(self, outcome: Outcome) -> Evaluation | None:
        """Return the figures of the last step: those it was measured with, if it was; None after a signal."""
        if outcome.last_record is not None and outcome.last_record.held_out is not None:
            return self._last
        return None if outcome.reason == "signal" or not self.is_there else self.measure()


def figures_of(evaluation: Evaluation) -> dict[str, float]:
    """Return an evaluation as the figures of a record."""
    figures = {"loss": evaluation.loss, "perplexity": evaluation.perplexity}
    if evaluation.bits_per_byte is not None:
        figures["bits_per_byte"] = evaluation.bits_per_byte
    return figures


def resumable_config(run_dir: Path, flags: Mapping[str, str]) -> RunConfig:
    """Read the config that a run was started with, with flags over it."""
    return load_config(RunFolder(run_dir).config, flags)
