"""Ranks write one checkpoint together: every tensor once, whole, and all or nothing (`train.joint`)."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from train_toy import write_model

from entrenar.errors import CheckpointError, DiskFullError, MachineError
from entrenar.files import write_json
from entrenar.train import Task, World, joint
from entrenar.train.checkpoint import Snapshot, load
from entrenar.train.joint import JointWriter, deal
from entrenar.train.manifest import write_manifest
from entrenar.train.world import Pieces

SIZE = 3
WEIGHTS = {f"layer.{number}": torch.full((number + 1, 4), float(number)) for number in range(7)}
MOMENTS = {"step": torch.tensor(3.0), **{f"{name}.mean": tensor + 0.5 for name, tensor in WEIGHTS.items()}}
STATE = {
    "counters": {"step": 3}, "rng": dict.fromkeys(("python", "numpy", "torch", "cuda")), "config": {}, "loader": None,
    "monitor": dict.fromkeys(("windows", "dead_steps", "slow_steps", "skipped_steps")), "rows": None,
}  # fmt: skip


def on_threads(action: Callable[[World], Any]) -> list[Any]:
    """Run `action` on ranks that are threads; return the result or the error of each."""
    barrier, held, results = threading.Barrier(SIZE), [torch.zeros(0)] * SIZE, [None] * SIZE

    def run(rank: int) -> None:
        def reduce(tensor: Tensor) -> None:
            held[rank] = tensor.clone()
            barrier.wait(timeout=30)
            total = torch.stack(held).sum(0).to(tensor.dtype)
            barrier.wait(timeout=30)
            tensor.copy_(total)

        try:
            results[rank] = action(World(rank, SIZE, reduce))
        except MachineError as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


def save(
    path: Path, *, is_indexed: bool = True, limit: int = 60, before_commit: Callable[[], object] = lambda: None
) -> list[Any]:
    """Save a snapshot as all ranks; each holds everything, and returns how often it was told that all is read."""

    def write(world: World) -> int:
        calls: list[int] = []
        pieces = Pieces(1, SIZE, lambda tensor, to: tensor if to == world.rank else None, world, lambda: None, {})
        task = Task(nn.Identity(), iter(()), lambda _: torch.zeros(()), write_model, lambda _: {})
        if is_indexed:
            task = replace(task, write_index=lambda folder, _, files: write_json(folder / "index.json", dict(files)))
        writer = JointWriter(task, pieces, before_commit, limit)
        writer.write(path, Snapshot(3, WEIGHTS, MOMENTS, STATE), lambda: calls.append(1))
        return len(calls)

    return on_threads(write)


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=30), ranks=st.integers(1, 5), limit=st.integers(1, 200))
def test_each_tensor_is_dealt_once_and_evenly(sizes: list[int], ranks: int, limit: int) -> None:
    """A round has at most one file of a rank; no rank has more than a tensor beyond the least, nor beyond the limit."""
    tensors = {f"t{number}": torch.empty(size, dtype=torch.uint8) for number, size in enumerate(sizes)}
    rounds = deal("model/model.safetensors", tensors, ranks, limit)
    files = [file for each in rounds for file in each]
    assert sorted(name for file in files for name in file.names) == sorted(tensors)
    count = len(files)
    names = [f"model/model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert [file.path for file in files] == (names if count > 1 else ["model/model.safetensors"])
    for each in rounds:
        loads = dict.fromkeys(range(ranks), 0) | {f.rank: sum(tensors[n].numel() for n in f.names) for f in each}
        assert len({file.rank for file in each}) == len(each)
        assert max(loads.values()) - min(loads.values()) <= max(sizes)
        assert max(loads.values()) < limit + max(sizes)


@pytest.mark.parametrize("limit", [60, 1 << 20])
def test_every_byte_is_written_once(tmp_path: Path, limit: int) -> None:
    """Each tensor lies whole in one file, each rank writes some, the manifest vouches for all, and it is read again."""
    path = tmp_path / "step-00000003"
    assert all(calls >= 1 for calls in save(path, limit=limit))
    loaded = load(path)
    files = sorted(path.rglob("*.safetensors"))
    held = [name for file in files for name in load_file(file)]
    assert sorted(held) == sorted([*WEIGHTS, *MOMENTS])
    assert len(files) >= 2 * SIZE
    assert all(torch.equal(loaded.optimizer()[name], tensor) for name, tensor in MOMENTS.items())
    places = json.loads((path / "model" / "index.json").read_text())
    assert all(torch.equal(load_file(path / "model" / places[name])[name], w) for name, w in WEIGHTS.items())


def test_a_model_without_an_index_is_one_folder_by_the_writer(tmp_path: Path) -> None:
    """An adapter is gathered; what `write_model` writes is what one process would have written."""
    path = tmp_path / "step-00000003"
    save(path, is_indexed=False)
    written = load_file(load(path).model / "model.safetensors")
    assert written.keys() == WEIGHTS.keys()


@pytest.mark.parametrize("name", ["model/model-00002-of-00003.safetensors", "optimizer-00003-of-00003.safetensors"])
def test_a_missing_file_of_a_rank_is_named(tmp_path: Path, name: str) -> None:
    """The share of one rank was lost: the checkpoint is damaged, and the message names the file."""
    path = tmp_path / "step-00000003"
    save(path, limit=1 << 20)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=rf"is damaged: {name} cannot be read \(No such file"):
        load(path)


def test_a_manifest_without_any_optimizer_is_refused(tmp_path: Path) -> None:
    """Numbered files count as the optimizer's; without one the manifest is not ours."""
    path = tmp_path / "step-00000003"
    save(path)
    for file in path.glob("optimizer*"):
        file.unlink()
    (path / "manifest.json").unlink()
    write_manifest(path, {"step": 3, "held_out_loss": None})
    with pytest.raises(CheckpointError, match=r"it lists no optimizer.safetensors"):
        load(path)


def _full_disk_on(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tensors = joint.save_tensors

    def full(path: Path, tensors: Any) -> None:
        if threading.current_thread().name == f"rank {rank}":
            raise OSError(28, "No space left on device", str(path))
        save_tensors(path, tensors)

    monkeypatch.setattr(joint, "save_tensors", full)


@pytest.mark.parametrize("rank", range(SIZE))
def test_a_full_disk_on_one_rank_fails_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Every rank takes part to the end, raises the same error, and no folder is left; the next save works."""
    path = tmp_path / "step-00000003"
    with monkeypatch.context() as patch:
        _full_disk_on(rank, patch)
        errors = save(path)
    assert [type(error) for error in errors] == [DiskFullError] * SIZE
    assert len({str(error) for error in errors}) == 1
    assert list(tmp_path.iterdir()) == []
    save(path)
    assert load(path).step == 3


def test_a_commit_or_a_folder_that_fails_on_the_writer_fails_on_all(tmp_path: Path) -> None:
    """Before the first word and after the last file, the others learn of it; nothing is left behind."""

    def refuse() -> None:
        raise MachineError("the records cannot be written")

    errors = save(tmp_path / "step-00000003", before_commit=refuse)
    assert [str(error) for error in errors] == ["the records cannot be written"] * SIZE
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    errors = save(tmp_path / "file" / "step-00000003")
    assert len({str(error) for error in errors}) == 1
    assert all(isinstance(error, MachineError) for error in errors)
