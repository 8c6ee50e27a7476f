"""Plan a run from its config: the same parts as in the run, put together without a byte of weights or data.

config -> shapes of the weights -> adapter -> loss -> batches of full rows -> rehearsal of one step
"""

import functools
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import cast

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from entrenar.config import AnyConfig, FinetuneConfig, RunConfig
from entrenar.data import Batch
from entrenar.interop import bits, bnb
from entrenar.interop.assemble import set_parameter
from entrenar.interop.hf import open_folder, read_config
from entrenar.interop.safetensors_file import Entry
from entrenar.model import Llama, LlamaConfig
from entrenar.model.streaming import LayerStream
from entrenar.ops import Int8Weight, Nf4Weight, NfBitsWeight, QuantizedWeight
from entrenar.ops.quantized import bits as nf_bits
from entrenar.ops.quantized import nf4
from entrenar.ops.quantized.bits import WIDTHS
from entrenar.peft import LoraConfig, LoraLinear, from_base, put_quantized, wrappers
from entrenar.planning import Ledger, Plan, Scene, go_through, plan, status_bytes
from entrenar.recipe.bit_budget import check_budget
from entrenar.recipe.models import give_storage, model_folder
from entrenar.recipe.pretrain import batch_loss
from entrenar.recipe.run import keeps_freed_memory, settle_compute_dtype, use_machine
from entrenar.train import build_optimizer
from entrenar.train.allocator import RETURNED_FROM
from entrenar.train.offload import BEHIND_BYTES, LEAST_BYTES

_CPU = torch.device("cpu")
# What a packed row is made of, on an average: it decides how attention is cut up, hardly how much it takes.
_DOCUMENTS_OF_A_ROW = 4
_MOST_REHEARSED = 2


@dataclass(frozen=True)
class RunPlan:
    """What a run of a config takes.

    Attributes:
        step: memory, and time of a whole optimizer step with all its micro-batches.
        parameters: of the base; the trained ones are in `step`.
        needed_flops: what the model needs for a step (`LlamaConfig.flops_per_token`), whoever computes it.
        tokens: of a step.
        kept_checkpoints: how many the run keeps at most, the one being written included.
        cache_bytes: what a trunk cache and a file of activations may take on the disk.
    """

    step: Plan
    parameters: int
    needed_flops: int
    tokens: int
    kept_checkpoints: int
    cache_bytes: int

    @property
    def disk_bytes(self) -> int:
        """What the run writes at most, metrics and logs apart."""
        return self.kept_checkpoints * self.step.checkpoint_bytes + self.cache_bytes


def plan_run(config: AnyConfig, imports_bytes: int | None = None) -> RunPlan:
    """Return what a run of `config` will take on this machine's CPU; nothing large is allocated.

    Sets threads, allocator and seeds as the run does. A process that has computed nothing yet holds what
    the imports take, and a step of no size is taken first; otherwise `imports_bytes` says what they took.

    Raises:
        ConfigError, DataError, FormatError: the config asks for a model that is not there.
    """
    is_first = imports_bytes is None
    imports_bytes = status_bytes("VmRSS") if imports_bytes is None else imports_bytes
    use_machine(config)
    config = cast(AnyConfig, settle_compute_dtype(cast(RunConfig, config), _CPU, None))
    if is_first:
        _smallest_step(config)
    architecture = config.model if isinstance(config, RunConfig) else read_config(model_folder(config.model))
    rows, length = batch_shape(config, architecture)
    accumulated = config.train.grad_accum_steps
    rehearsed = min(accumulated, _MOST_REHEARSED)

    begun = skeleton(config)

    def build(ledger: Ledger) -> Scene:
        mapped = give_shapes(config, begun, ledger)
        batch = full_rows(rows, length, architecture.vocab_size, has_documents=has_documents_in(config))
        scene = scene_of(config, begun.model, [batch] * rehearsed, mapped)
        if not config.train.stream_base:
            return scene
        stream = _Stream(begun.model, mapped, ledger)
        begun.model.stream = cast(LayerStream, stream)
        return replace(scene, streamed_bytes=stream.size_bytes)

    returned_from = None if keeps_freed_memory(config) else RETURNED_FROM
    step = plan(build, imports_bytes, getattr(torch, config.compute_dtype), returned_from)
    times = accumulated / rehearsed
    tokens = rows * length * accumulated
    return RunPlan(
        step=replace(step, flops=round(step.flops * times), step_s=step.step_s * times),
        parameters=architecture.parameter_count(),
        needed_flops=architecture.flops_per_token(length) * tokens,
        tokens=tokens,
        kept_checkpoints=config.checkpoint.keep_last + config.checkpoint.keep_best + 1,
        cache_bytes=_cache_bytes(config),
    )


def _cache_bytes(config: AnyConfig) -> int:
    is_cached = isinstance(config, FinetuneConfig) and config.trunk.cache_trunk
    budgets = [config.trunk.trunk_budget_gb] if isinstance(config, FinetuneConfig) and is_cached else []
    budgets += [config.train.offload_budget_gb] if config.train.offload == "disk" else []
    return int(sum(budgets) * 1e9)


def batch_shape(config: AnyConfig, architecture: LlamaConfig) -> tuple[int, int]:
    """Return rows and length of a micro-batch."""
    data = config.data if isinstance(config, RunConfig) else config.sft
    return data.batch_size, min(data.seq_len, architecture.context_length)


def has_documents_in(config: AnyConfig) -> bool:
    """Say whether rows hold several documents."""
    return config.data.mask_documents if isinstance(config, RunConfig) else config.sft.batching == "packed"


def full_rows(rows: int, length: int, vocab_size: int, *, has_documents: bool) -> Batch:
    """Return a batch with no padding and a target everywhere: no batch of that shape takes more."""
    ids = torch.arange(rows * length).view(rows, length) % vocab_size
    documents = torch.arange(length) * min(_DOCUMENTS_OF_A_ROW, length) // length
    return Batch(ids, ids, documents.int().expand(rows, length).contiguous() if has_documents else None, None)


@dataclass(frozen=True)
class Skeleton:
    """A model that has no weights in the run either, and where in a folder they will come from.

    Attributes:
        parts: of each weight, in the order in which they are read; a plain one has one part; empty for a new model.
    """

    model: Llama
    parts: Mapping[str, Mapping[str, Entry]]


def skeleton(config: AnyConfig) -> Skeleton:
    """Return the model of a config as the run has it before there are weights."""
    if isinstance(config, FinetuneConfig):
        model, places, _ = open_folder(model_folder(config.model))
        return Skeleton(
            model, {name: {part: entry for part, (_, entry) in parts.items()} for name, parts in places.items()}
        )
    with torch.device("meta"):
        return Skeleton(Llama(config.model), {})


def give_shapes(config: AnyConfig, begun: Skeleton, ledger: Ledger) -> list[Tensor]:
    """Give a model its weights without their bytes, as the run does; return those that stay in a mapped file."""
    if isinstance(config, RunConfig):
        give_storage(begun.model, _CPU)
        begun.model.init_weights(torch.Generator())
        return []
    mapped = _load_shapes(config, begun, ledger)
    if config.method != "full":
        from_base(begun.model, config.lora, torch.Generator())
        _put_principal_parts(begun.model, config)
    return mapped


def storage_dtype(config: FinetuneConfig) -> torch.dtype | None:
    """Return what weights are loaded as, None for what they are in the file; see `finetune`."""
    if config.train.precision == "float32":
        return torch.float32
    return None if config.method == "full" else torch.bfloat16


def _load_shapes(config: FinetuneConfig, begun: Skeleton, ledger: Ledger) -> list[Tensor]:
    plain = [parts[""].dtype for parts in begun.parts.values() if len(parts) == 1]
    dtype = storage_dtype(config) or functools.reduce(torch.promote_types, plain)
    model = begun.model
    config.quantize.check_tied(is_tied=model.config.tie_word_embeddings)
    if config.quantize.bits is not None and len(plain) == len(begun.parts):
        check_budget(model, config.quantize.bits, dtype)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    mapped: list[Tensor] = []

    def empty(shape: Sequence[int], held_as: torch.dtype, *, is_mapped: bool) -> Tensor:
        with ledger.mapped() if is_mapped else nullcontext():
            tensor = torch.empty(tuple(shape), dtype=held_as, device="meta")
        mapped.extend([tensor] if is_mapped else [])
        return tensor

    for name, parts in begun.parts.items():
        if name not in shapes:  # a head that is the embedding
            continue
        is_packed = len(parts) > 1
        kind = _kind_in(parts) if is_packed else _kind_in_run(config, name)
        if kind == "keep":
            is_mapped = parts[""].dtype == dtype
            set_parameter(model, name, empty(shapes[name], dtype, is_mapped=is_mapped))
        else:
            shape = shapes[name][0], shapes[name][1]
            weight = _few_bits(kind, shape, functools.partial(empty, is_mapped=is_packed))
            put_quantized(model, name.removesuffix(".weight"), weight, dtype)
    return mapped


def _kind_in(parts: Mapping[str, Entry]) -> str:
    """Return as what a weight lies in a folder: nf4, int8, or a number of bits."""
    if bits.PARTS[0] in parts:
        return str(parts[""].shape[1])
    return "int8" if bnb.ROW_ABSMAX in parts else "nf4"


def _kind_in_run(config: FinetuneConfig, name: str) -> str:
    """Return as what a run holds a weight that is plain in its folder; in a budget of bits, as if all had the same."""
    if config.method != "qlora":
        return "keep"
    is_in_budget = config.quantize.bits is not None and not name.endswith("norm.weight")
    if not is_in_budget:
        return config.quantize.kind_of(name)
    return str(min(max(WIDTHS), math.ceil(config.quantize.bits or 0)))


def _few_bits(
    kind: str, shape: tuple[int, int], empty: Callable[[Sequence[int], torch.dtype], Tensor]
) -> QuantizedWeight:
    rows, width = shape
    if kind == "nf4":
        blocks = -(-rows * width // nf4.BLOCK)
        return Nf4Weight(
            empty((-(-rows * width // 2),), torch.uint8),
            empty((blocks,), torch.uint8),
            empty((-(-blocks // nf4.NESTED_BLOCK),), torch.float32),
            torch.zeros((), device="meta"),
            shape,
        )
    if kind == "int8":
        return Int8Weight(empty(shape, torch.int8), empty((rows,), torch.float32), shape)
    blocks = -(-width // nf_bits.BLOCK)
    return NfBitsWeight(
        empty((rows, int(kind), -(-width // 8)), torch.uint8),
        empty((rows, blocks), torch.int8),
        empty((-(-rows // nf_bits.GROUP), blocks), torch.float32),
        shape,
    )


def _put_principal_parts(model: Llama, config: FinetuneConfig) -> None:
    """Give PiSSA's adapters what they begin at, which takes the weights' numbers to compute, not to plan."""
    if config.lora.lora_init != "pissa":
        return
    for _, module in wrappers(model):
        if isinstance(module, LoraLinear) and module.active is not None:
            adapter = module.adapter(module.active)
            adapter.start_from(adapter.lora_A.detach(), adapter.lora_B.detach())


def scene_of(config: AnyConfig, model: Llama, batches: list[Batch], mapped: list[Tensor]) -> Scene:
    """Put a model, with bytes or without, into training as the recipes do."""
    model.set_compute_dtype(getattr(torch, config.compute_dtype))
    model.train()
    model.checkpointing = config.train.checkpointing
    loss = batch_loss(model, _CPU, is_compiled=False)
    if config.train.offload == "disk":
        loss = _offloaded(model, loss)
    return Scene(model, loss, batches, config.optim, config.train.precision, mapped)


class _Stream:
    """Stands for `model.streaming.LayerStream`: the mapped weights of a layer are there while it is used.

    Attributes:
        size_bytes: what of all layers comes and goes.
    """

    def __init__(self, model: Llama, mapped: Sequence[Tensor], ledger: Ledger) -> None:
        own = {tensor.untyped_storage()._cdata for tensor in mapped}
        self._sizes = [
            sum(t.nbytes for t in chain(layer.parameters(), layer.buffers()) if t.untyped_storage()._cdata in own)
            for layer in model.model.layers
        ]
        self.size_bytes = sum(self._sizes)
        self._ledger = ledger
        self._held: Tensor | None = None

    def begin(self, layer: int) -> None:
        """Let a layer be there, and no other; it counts among what comes and goes, which is not in the mapped rest."""
        self._held = None
        self._held = torch.empty(self._sizes[layer], dtype=torch.uint8, device="meta")
        self._ledger.mark([self._held], "weights")

    def end(self, layer: int, out: Tensor) -> None:
        """Let it go until the backward comes to it."""
        self._held = None
        if out.requires_grad:
            out.register_hook(lambda _: self.begin(layer))  # type: ignore[no-untyped-call]


def _offloaded(model: Llama, loss: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
    """Return a loss whose tape lets large activations go and gets them back, as `train.offload` does with a file."""

    def pack(tensor: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...], torch.dtype]:
        is_kept = not tensor.is_meta or tensor.nbytes < LEAST_BYTES or tensor.untyped_storage()._cdata in own
        if not is_kept:
            behind.append(tensor.detach())
            while sum(one.nbytes for one in behind) > BEHIND_BYTES:
                behind.popleft()
        return tensor if is_kept else (tensor.shape, tensor.stride(), tensor.dtype)

    def unpack(saved: Tensor | tuple[torch.Size, tuple[int, ...], torch.dtype]) -> Tensor:
        behind.clear()
        if isinstance(saved, Tensor):
            return saved
        shape, stride, dtype = saved
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    behind: deque[Tensor] = deque()

    def offloaded(batch: Batch) -> Tensor:
        with saved_tensors_hooks(pack, unpack):
            return loss(batch)

    return offloaded


def _smallest_step(config: AnyConfig) -> None:
    """Train a model of no size for a step, so that kernels and libraries are there."""
    model = Llama(LlamaConfig(vocab_size=64, hidden_size=64, num_layers=1, num_heads=2, intermediate_size=128))
    model.init_weights(torch.Generator().manual_seed(0))
    if isinstance(config, FinetuneConfig) and config.method != "full":
        # Whatever fits a model of this size: ranks and places are the real model's.
        from_base(model, LoraConfig(rank=1, use_dora=config.lora.use_dora), torch.Generator())
    scene = scene_of(config, model, [full_rows(2, 64, 64, has_documents=has_documents_in(config))], [])
    optimizer = build_optimizer(model.named_parameters(), scene.optim, scene.precision)
    go_through(scene, optimizer, Ledger())
