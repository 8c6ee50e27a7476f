"""Cut a model's weights over the ranks with FSDP2, so that each holds a piece of every weight and of its moments.

torch's `fully_shard` gathers the weights of a block just before its forward and its backward, and sums the gradients
into the pieces when the backward of the block is done. A hybrid mesh (HSDP) cuts within groups of ranks and sums over
the groups. Weights that lie outside of the blocks (embedding, norm, head) are one more unit, gathered for the step.

Zhao et al. 2023, arXiv:2304.11277; https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from entrenar.errors import ConfigError
from entrenar.memory import memory_limit
from entrenar.model import Llama
from entrenar.peft import quantized_projections
from entrenar.scale.ranks import in_contact, note
from entrenar.scale.settings import ScaleConfig
from entrenar.train import OptimConfig, TrainConfig, World
from entrenar.train.pieces import is_in_pieces, own_part
from entrenar.train.precision import cast_parameters
from entrenar.train.world import Pieces

# What is called from outside of the model and reads weights.
_ENTRANCES = ("loss", "hidden", "logits")
_MOMENTS_BYTES = 8


def shard(model: Llama, config: ScaleConfig, world: World, train: TrainConfig, optim: OptimConfig) -> World:
    """Cut the weights of `model` over the ranks as `config` says, and return the world that knows of the pieces.

    The model is then in the precision of the run, and every rank must call it in step with the others.

    Raises: ConfigError for ranks that do not make such groups, and for what needs whole weights.
    """
    size = group_size(config, world, whole_bytes(model.parameters()), optim)
    if size == 1:
        return world
    _check_possible(train, optim)
    remainders = _cast(model) if train.precision == "bfloat16" else {}
    timeout = timedelta(seconds=train.rank_timeout_s)
    mesh = _mesh(world, size, timeout)
    for _, projection in quantized_projections(model):
        projection.hold_as_parameters()
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if train.precision == "bfloat16" else None)
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
        block.register_forward_pre_hook(lambda *_: note())
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for unit in (*model.model.layers, model):
        cast(FSDPModule, unit).set_gradient_divide_factor(1.0)  # the loss is a sum, divided once by the targets
        cast(FSDPModule, unit).set_force_sum_reduction_for_comms(True)  # gloo has no other
    for name in _ENTRANCES:
        register_fsdp_forward_method(model, name)
    gather = _Gather(size, dist.new_group(list(range(size)), timeout=timeout))
    apart = _apart(world, dist.new_group(timeout=timeout))
    pieces = Pieces(world.size // size, size, gather, apart, cast(FSDPModule, model).reshard, remainders)
    return replace(world, pieces=pieces)


def group_size(config: ScaleConfig, world: World, model_bytes: int, optim: OptimConfig) -> int:
    """Return how many ranks hold one copy of the model together; every rank returns the writer's answer.

    Raises: ConfigError when the ranks do not divide into groups of the size asked for.
    """
    if world.size == 1 or config.shard == "none":
        return 1
    if config.shard == "full":
        return world.size
    if config.shard == "hybrid":
        wanted = config.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
        if world.size % wanted:
            raise ConfigError(
                f"scale.shard_size must divide the number of ranks, {world.size}, got {wanted}; choose a divisor, or "
                f"start a multiple of {wanted} ranks"
            )
        return wanted
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    fits = model_bytes * on_this_machine <= memory_limit().size_bytes // 2
    return world.broadcast(1 if fits or optim.optimizer != "adamw" else world.size)


def whole_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Return what a rank would hold of the weights, their gradients and their moments without sharding."""
    total = 0
    for parameter in parameters:
        trained = parameter.nbytes + _MOMENTS_BYTES * parameter.numel() if parameter.requires_grad else 0
        total += parameter.nbytes + trained
    return total


def _check_possible(train: TrainConfig, optim: OptimConfig) -> None:
    reasons = {
        "optim.optimizer": (optim.optimizer, "adamw", "only AdamW moves each number of a weight by itself"),
        "train.compile": (train.compile, False, "the compiled loss would see pieces"),
        "train.stream_base": (train.stream_base, False, "a base in pieces is not mapped from its file"),
        "train.offload": (train.offload, "none", "gathered weights would be moved away with the activations"),
    }
    for key, (value, wanted, reason) in reasons.items():
        if value != wanted:
            raise ConfigError(
                f"{key} must be {wanted} where weights are cut over ranks, got {value}: {reason}; set that, or "
                "scale.shard = none"
            )


def _cast(model: nn.Module) -> Mapping[str, Tensor]:
    """Turn the model into bfloat16 while its weights are whole; return the remainders by name."""
    remainders = cast_parameters(model.parameters())
    return {name: remainders[p] for name, p in model.named_parameters() if p in remainders}


def _mesh(world: World, size: int, timeout: timedelta) -> DeviceMesh:
    """Return the mesh of all ranks: one dimension if one group holds the model, else (copies, pieces)."""
    numbers = torch.arange(world.size).view(-1, size)
    if len(numbers) == 1:
        return DeviceMesh.from_group(cast(Any, dist.group.WORLD), "cpu", mesh_dim_names=("shard",))
    ways = (numbers.T.tolist(), numbers.tolist())
    groups = [dist.new_subgroups_by_enumeration(way, timeout=timeout)[0] for way in ways]  # type: ignore[no-untyped-call]
    return DeviceMesh.from_group(groups, "cpu", mesh=numbers, mesh_dim_names=("replicate", "shard"))


class _Gather:
    """Brings the pieces of a tensor together; ranks beyond the first copy of the model take no part."""

    def __init__(self, size: int, group: Any) -> None:
        self._size, self._rank, self._group = size, dist.get_rank(), group

    def __call__(self, tensor: Tensor, to: int) -> Tensor | None:
        """Return a copy of the whole of a tensor on rank `to`, None elsewhere.

        Raises: MachineError.
        """
        if not is_in_pieces(tensor) or self._rank >= self._size:
            return tensor.clone() if self._rank == to else None
        part, rows = own_part(tensor), -(-tensor.shape[0] // self._size)
        padded = part.new_zeros((rows, *part.shape[1:]))
        padded[: len(part)] = part
        sent = padded.view(-1).view(torch.uint8)  # gloo does not know every dtype
        received = [torch.empty_like(sent) for _ in range(self._size)] if self._rank == to else None
        with in_contact():
            dist.gather(sent, received, dst=to, group=self._group)
        if received is None:
            return None
        return torch.cat(received).view(part.dtype).view(-1, *part.shape[1:])[: tensor.shape[0]]


def _apart(world: World, group: Any) -> World:
    """Return the same ranks over another group, for a thread that works beside the training."""

    def add_up(tensor: Tensor) -> None:
        with in_contact():
            dist.all_reduce(tensor, group=group)

    return World(world.rank, world.size, add_up)
