"""Ranks that would train different runs are refused on every rank (`scale.agreement`, `scale.identity`)."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from entrenar.errors import ConfigError
from entrenar.scale import check_same, check_shared, gather, weight_hashes
from entrenar.train import World


def on_ranks(size: int, action: Callable[[World], Any]) -> list[Any]:
    """Run `action` on ranks that are threads; return the result or the ConfigError of each."""
    barrier, held, results = threading.Barrier(size), [torch.zeros(0)] * size, [None] * size

    def reduce_on(rank: int) -> Callable[[Tensor], None]:
        def reduce(tensor: Tensor) -> None:
            held[rank] = tensor.clone()
            barrier.wait(timeout=30)
            total = torch.stack(held).sum(0).to(tensor.dtype)
            barrier.wait(timeout=30)
            tensor.copy_(total)

        return reduce

    def run(rank: int) -> None:
        try:
            results[rank] = action(World(rank, size, reduce_on(rank)))
        except ConfigError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


def test_every_rank_learns_what_each_holds():
    """Values of unequal length arrive whole and in the order of the ranks."""
    values = [{"a": "x" * 300}, None, [1.5, "für"]]
    assert on_ranks(3, lambda world: gather(world, values[world.rank])) == [values] * 3


def test_equal_facts_pass():
    """Nothing is raised for equal facts, nor by a process alone."""
    assert on_ranks(3, lambda world: check_same(world, {"a": {"b": 1}})) == [None] * 3
    check_same(World.alone(), {"a": 1})


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"optim": {"lr": 0.5}, "seed": 0}, "optim.lr is 0.1 on rank 0 and 0.5 on rank 2"),
        ({"optim": {"lr": 0.1}}, "seed is 0 on rank 0 and 'not there' on rank 2"),
    ],
)
def test_a_difference_is_named_on_every_rank(facts, said):
    """One rank of three differs: all end with the same message, which names the key and both values."""
    usual = {"optim": {"lr": 0.1}, "seed": 0}
    errors = on_ranks(3, lambda world: check_same(world, facts if world.rank == 2 else usual))
    assert [str(error) for error in errors] == [
        f"all ranks must train the same run, but {said}; give every rank the same command, files and versions"
    ] * 3


def test_storage_that_is_not_shared_is_found(tmp_path):
    """A rank that has another folder at the run's path is named; the shared folder is left as it was."""
    (tmp_path / "one").mkdir()
    assert on_ranks(2, lambda world: check_shared(world, tmp_path / "one")) == [None, None]
    folders: list[Path] = [tmp_path / "one", tmp_path / "elsewhere"]
    errors = on_ranks(2, lambda world: check_shared(world, folders[world.rank]))
    assert all("must be on storage that all ranks share, but rank 1 does not see" in str(error) for error in errors)
    assert list((tmp_path / "one").iterdir()) == []
    check_shared(World.alone(), tmp_path / "nowhere")


def test_a_changed_weight_has_another_hash():
    """Each parameter and buffer has its hash, scalars and integers too; one changed bit changes one hash."""
    module = nn.BatchNorm1d(3)
    before = weight_hashes(module)
    assert before.keys() == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    with torch.no_grad():
        module.bias[1] += 1e-30
    after = weight_hashes(module)
    assert weight_hashes(module, only_frozen=True).keys() == before.keys() - {"weight", "bias"}
    assert {name for name in before if before[name] != after[name]} == {"bias"}
