"""How weights are spread over ranks, and what cannot be (`scale.sharding`, `scale.settings`)."""

import importlib
from contextlib import nullcontext

import pytest

from entrenar.errors import ConfigError, OutOfMemoryError
from entrenar.memory import MemoryLimit
from entrenar.model import Llama, LlamaConfig
from entrenar.scale import ScaleConfig, shard
from entrenar.train import OptimConfig, TrainConfig, World
from entrenar.train.precision import GradientSums
from entrenar.train.step import RowLimit, StepGradient
from entrenar.train.world import Pieces

sharding = importlib.import_module("entrenar.scale.sharding")
TINY = LlamaConfig(vocab_size=64, hidden_size=64, num_layers=1, num_heads=2, intermediate_size=64)
ADAMW = OptimConfig()


def ranks(size, monkeypatch=None, *, memory_bytes=0):
    """Return rank 0 of a world that never needs the others; all of them are on this machine."""
    if monkeypatch is not None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        monkeypatch.setattr(sharding, "memory_limit", lambda: MemoryLimit(memory_bytes, "the test"))
    return World(0, size, lambda _: None)


@pytest.mark.parametrize(
    ("size", "options", "memory_bytes", "expected"),
    [
        (1, {"shard": "full"}, 0, 1),
        (4, {"shard": "none"}, 0, 1),
        (4, {"shard": "full"}, 0, 4),
        (4, {"shard": "hybrid", "shard_size": 2}, 0, 2),
        (6, {"shard": "hybrid"}, 0, 6),
        (4, {}, 8000, 1),
        (4, {}, 7999, 4),
    ],
)
def test_the_ranks_of_one_copy(monkeypatch, size, options, memory_bytes, expected):
    """What is asked for is taken; auto cuts a model of 1000 bytes when four times that is beyond half of the memory."""
    world = ranks(size, monkeypatch, memory_bytes=memory_bytes)
    assert sharding.group_size(ScaleConfig(**options), world, 1000, ADAMW) == expected


def test_auto_leaves_whole_what_needs_whole_weights(monkeypatch):
    """Muon multiplies whole matrices."""
    world = ranks(4, monkeypatch, memory_bytes=1)
    assert sharding.group_size(ScaleConfig(), world, 1000, OptimConfig(optimizer="muon")) == 1


def test_a_group_that_does_not_divide_the_ranks_is_refused():
    """Three of four ranks cannot be a group; the message names both numbers."""
    with pytest.raises(ConfigError, match=r"scale.shard_size must divide the number of ranks, 4, got 3; choose"):
        sharding.group_size(ScaleConfig(shard="hybrid", shard_size=3), ranks(4), 1000, ADAMW)


@pytest.mark.parametrize(
    ("train", "optim", "said"),
    [
        ({}, {"optimizer": "muon"}, "optim.optimizer must be adamw where weights are cut over ranks, got muon"),
        (
            {},
            {"optimizer": "adamw8bit"},
            "optim.optimizer must be adamw where weights are cut over ranks, got adamw8bit",
        ),
        ({"compile": True}, {}, "train.compile must be False where"),
        ({"stream_base": True}, {}, "train.stream_base must be False where"),
        ({"offload": "disk"}, {}, "train.offload must be none where"),
    ],
)
def test_what_needs_whole_weights_is_refused(train, optim, said):
    """The option is named, with the reason and both ways out."""
    with pytest.raises(ConfigError, match=f"{said}.*; set that, or scale.shard = none"):
        shard(Llama(TINY), ScaleConfig(shard="full"), ranks(2), TrainConfig(max_steps=1, **train), OptimConfig(**optim))


def test_the_bytes_of_a_whole_model():
    """Weights, and for those that are trained a gradient and two float32 moments."""
    model = Llama(TINY)
    trained = sum(parameter.numel() for parameter in model.parameters())
    assert sharding.whole_bytes(model.parameters()) == 16 * trained
    model.requires_grad_(requires_grad=False)
    assert sharding.whole_bytes(model.parameters()) == 4 * trained


def test_memory_that_runs_out_between_exchanges_ends_the_rank():
    """The others wait in the middle of the step, so it cannot be repeated in parts; the message says what can."""

    def loss(_):
        raise MemoryError("no more")

    model = Llama(TINY)
    world = World(0, 2, lambda _: None, Pieces(1, 2, lambda tensor, _: tensor, World.alone(), lambda: None, {}))
    step = StepGradient(loss, GradientSums(model.parameters()), RowLimit(), world, lambda _: nullcontext(), print)
    with pytest.raises(OutOfMemoryError, match=r"in the middle of a step \(no more\).*set a smaller batch_size"):
        step.take([_Row()])


class _Row:
    num_targets = 1

    def split(self, _):
        return [self]
