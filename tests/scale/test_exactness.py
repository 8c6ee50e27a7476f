"""Ranks train as one process does, to 1e-12 in float64, and a run may change its number of ranks (`scale`)."""

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from launched import TIMEOUT_S, free_port
from safetensors.torch import load_file

from entrenar.data import SftLoader
from entrenar.runs import read_records
from entrenar.train import latest_good

from exact_program import BATCH_SIZE, SEQ_LEN, examples  # isort: skip

PROGRAM = Path(__file__).with_name("exact_program.py")
STEPS = 20
CLOSE = 1e-12


def train(folder: Path, size: int, *, method: str = "full", batching: str = "packed", steps: int = STEPS) -> Path:
    """Train up to `steps` with `size` ranks, from the checkpoint in `folder` if there is one."""
    words = [sys.executable, str(PROGRAM), str(folder), method, batching, str(steps)]
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    each = [subprocess.Popen(words, env=os.environ | place | {"RANK": str(rank)}) for rank in range(size)]
    assert [process.wait(timeout=TIMEOUT_S) for process in each] == [0] * size
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Runs of one process, by method and batching."""
    place = tmp_path_factory.mktemp("alone")
    kinds = [("full", "packed"), ("full", "padded"), ("lora", "packed"), ("qlora", "packed")]
    return {kind: train(place / "-".join(kind), 1, method=kind[0], batching=kind[1]) for kind in kinds}


def assert_same(ranks: Path, one: Path) -> None:
    """Every step's targets, loss and norm, the final weights and the next gradient are the same to 1e-12."""
    for mine, expected in zip(*(list(read_records(run / "metrics.jsonl")) for run in (ranks, one)), strict=True):
        assert (mine["step"], mine["targets"]) == (expected["step"], expected["targets"])
        assert mine["loss"] == pytest.approx(expected["loss"], rel=CLOSE)
        assert mine["grad_norm"] == pytest.approx(expected["grad_norm"], rel=CLOSE)
    last, wanted = (latest_good(run / "checkpoints") for run in (ranks, one))
    assert last.loader_state == wanted.loader_state
    pairs = [(last.model / "model.safetensors", wanted.model / "model.safetensors")]
    pairs += [(ranks / "gradients.safetensors", one / "gradients.safetensors")]
    for mine, expected in (map(load_file, pair) for pair in pairs):
        assert mine.keys() == expected.keys()
        for name, tensor in expected.items():
            assert tensor.norm() > 0, name
            assert (mine[name] - tensor).norm() <= CLOSE * tensor.norm(), name


@pytest.mark.parametrize(
    ("method", "batching", "size"),
    [
        ("full", "packed", 2), ("full", "packed", 3), ("full", "padded", 2), ("lora", "packed", 2),
        ("lora", "packed", 3), ("qlora", "packed", 2), ("qlora", "packed", 3),
    ],
)  # fmt: skip
def test_ranks_equal_one_process(alone, tmp_path, method, batching, size):
    """Twenty steps of two micro-batches, with rows of unequal targets and epochs that end within a batch."""
    assert_same(train(tmp_path / "run", size, method=method, batching=batching), alone[method, batching])


def test_a_run_changes_its_number_of_ranks(alone, tmp_path):
    """Two ranks to step 7, three to step 14, one to the end: the data order, the losses and the end of one process."""
    for size, steps in ((2, 7), (3, 14), (1, STEPS)):
        train(tmp_path / "run", size, steps=steps)
    assert_same(tmp_path / "run", alone["full", "packed"])


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_each_batch_without_overlap_and_without_loss(size):
    """Over two epochs, the targets of all ranks' shares are those of the whole batch, each once."""

    def trained(rank: int = 0, world_size: int = 1) -> list[list[int]]:
        options = {"batch_size": BATCH_SIZE, "seq_len": SEQ_LEN, "seed": 0, "batching": "padded"}
        loader = SftLoader(examples(), **options, rank=rank, world_size=world_size)
        batches = (batch for batch, _ in zip(loader, range(2 * loader.batches_per_epoch), strict=False))
        return [sorted(batch[0].targets[batch[0].targets >= 0].tolist()) for batch in batches]

    shares = [trained(rank, size) for rank in range(size)]
    assert [sorted(chain.from_iterable(parts)) for parts in zip(*shares, strict=True)] == trained()
    assert all(any(parts[0] != part for part in parts[1:]) for parts in zip(*shares, strict=True))
