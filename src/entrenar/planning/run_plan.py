"""Plan a run from its config: the same parts as in the run, put together without a byte of weights or data.

config -> shapes of the weights -> adapter -> loss -> batches of full rows -> rehearsal of one step
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from entrenar.config import AnyConfig, FinetuneConfig
from entrenar.data import Batch, DataConfig, SftConfig
from entrenar.errors import ConfigError
from entrenar.memory import status_bytes
from entrenar.model import Llama, LlamaConfig, batch_loss
from entrenar.peft import LoraConfig, from_base
from entrenar.planning.ledger import Ledger
from entrenar.planning.machine import settle_compute_dtype
from entrenar.planning.rehearsal import Scene, take_step
from entrenar.planning.skeleton import give_shapes, skeleton
from entrenar.planning.stand_ins import RehearsedStream, offloaded
from entrenar.planning.step_plan import StepPlan, plan_step
from entrenar.train import build_optimizer, keeps_freed_memory, prepare_process
from entrenar.train.allocator import RETURNED_FROM

_CPU = torch.device("cpu")
# Documents in a packed row, on average: their number decides how attention is cut up, and hardly how much it takes.
_DOCUMENTS_PER_ROW = 4
_MOST_REHEARSED = 2


@dataclass(frozen=True)
class RunPlan:
    """Memory, arithmetic, time and disk of a run.

    Attributes:
        step: memory, and time of a whole optimizer step with all its micro-batches.
        parameters: of the base; the trained ones are in `step`.
        needed_flops: what the model needs for a step (`LlamaConfig.flops_per_token`), however it is computed.
        tokens: of a step.
        kept_checkpoints: how many the run keeps at most, the one being written included.
        cache_bytes: what a trunk cache and a file of activations may take on the disk.
    """

    step: StepPlan
    parameters: int
    needed_flops: int
    tokens: int
    kept_checkpoints: int
    cache_bytes: int

    @property
    def disk_bytes(self) -> int:
        """The most that the run writes, metrics and logs apart."""
        return self.kept_checkpoints * self.step.checkpoint_bytes + self.cache_bytes


def plan_run(
    config: AnyConfig, base: Path | None = None, imports_bytes: int | None = None, *, ranks: int = 1
) -> RunPlan:
    """Return what a run of `config` will take on this machine's CPU; nothing large is allocated.

    Sets threads, allocator and seeds as the run does. `base` is the folder of the model to fine-tune, needed where
    `config.model` names a run. A process that has computed nothing yet holds what the imports take, and warms up with a
    step of a tiny model; otherwise `imports_bytes` says what they took. Of several `ranks` one is planned, with its
    share of the rows.

    Raises:
        ConfigError, FormatError: the config asks for what the model cannot do, the batch cannot be shared, or the
            folder holds no model.
    """
    is_first = imports_bytes is None
    imports_bytes = status_bytes("VmRSS") if imports_bytes is None else imports_bytes
    prepare_process(config.train)
    config = settle_compute_dtype(config, _CPU)
    if is_first:
        _warm_up(config)
    begun = skeleton(config, base)
    architecture = begun.model.config
    batches = batches_of(config)
    rows, length = share_of_rows(batches.batch_size, ranks), min(batches.seq_len, architecture.context_length)
    accumulated = config.train.grad_accum_steps
    rehearsed = min(accumulated, _MOST_REHEARSED)

    def build(ledger: Ledger) -> Scene:
        mapped = give_shapes(config, begun, ledger)
        batch = full_rows(rows, length, architecture.vocab_size, has_documents=batches.packs_documents)
        scene = replace(scene_of(config, begun.model, [batch] * rehearsed, mapped), ranks=ranks)
        if not config.train.stream_base:
            return scene
        begun.model.stream = stream = RehearsedStream(begun.model, mapped, ledger)
        return replace(scene, streamed_bytes=stream.size_bytes)

    returned_from = None if keeps_freed_memory(config.train) else RETURNED_FROM
    step = plan_step(build, imports_bytes, getattr(torch, config.compute_dtype), returned_from)
    times = accumulated / rehearsed
    trunk_bytes = config.trunk.cache_bytes if isinstance(config, FinetuneConfig) else 0
    tokens = rows * length * accumulated
    return RunPlan(
        step=replace(step, flops=round(step.flops * times), moved_bytes=round(step.moved_bytes * times)),
        parameters=architecture.parameter_count(),
        needed_flops=architecture.flops_per_token(length) * tokens,
        tokens=tokens,
        kept_checkpoints=config.checkpoint.keep_last + config.checkpoint.keep_best + 1,
        cache_bytes=config.train.offload_bytes + trunk_bytes,
    )


def share_of_rows(batch_size: int, ranks: int) -> int:
    """Return the rows of a batch that each rank takes.

    Raises:
        ConfigError: they cannot be shared.
    """
    if batch_size % ranks:
        raise ConfigError(f"batch_size must be a multiple of the number of ranks ({ranks}), got {batch_size}")
    return batch_size // ranks


def batches_of(config: AnyConfig) -> DataConfig | SftConfig:
    """Return the settings that cut a run's data into batches."""
    return config.sft if isinstance(config, FinetuneConfig) else config.data


def full_rows(rows: int, length: int, vocab_size: int, *, has_documents: bool) -> Batch:
    """Return a batch with no padding and a target everywhere: no batch of that shape takes more."""
    ids = torch.arange(rows * length).view(rows, length) % vocab_size
    count = min(_DOCUMENTS_PER_ROW, length)
    documents = tuple(pairwise(-(-number * length // count) for number in range(count + 1)))
    return Batch(ids, ids, (documents,) * rows if has_documents else None, None)


def scene_of(config: AnyConfig, model: Llama, batches: list[Batch], mapped: list[Tensor]) -> Scene:
    """Set up training of a model in the same way as the recipes, with or without bytes."""
    model.set_compute_dtype(getattr(torch, config.compute_dtype))
    model.train()
    model.checkpointing = config.train.checkpointing
    loss = batch_loss(model, _CPU)
    if config.train.offload == "disk":
        loss = offloaded(model, loss)
    return Scene(model, loss, batches, config.optim, config.train.precision, mapped)


def _warm_up(config: AnyConfig) -> None:
    """Train a tiny model for a step, so that kernels and libraries are loaded."""
    model = Llama(LlamaConfig(vocab_size=64, hidden_size=64, num_layers=1, num_heads=2, intermediate_size=128))
    model.init_weights(torch.Generator().manual_seed(0))
    if isinstance(config, FinetuneConfig) and config.method != "full":
        # Rank and modules that fit a model of this size: the config's are those of the real model.
        from_base(model, LoraConfig(rank=1, use_dora=config.lora.use_dora), torch.Generator())
    scene = scene_of(config, model, [full_rows(2, 64, 64, has_documents=batches_of(config).packs_documents)], [])
    optimizer = build_optimizer(model.named_parameters(), scene.optim, scene.precision)
    take_step(scene, optimizer, Ledger())
