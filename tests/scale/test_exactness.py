"""Ranks train as one process does, to 1e-12 in float64, and a run may change its number of ranks (`scale`)."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from launched import TIMEOUT_S, free_port

from entrenar.data import SftLoader
from entrenar.runs import read_records
from entrenar.train import latest_good

from exact_program import BATCH_SIZE, SEQ_LEN, examples, weights_in  # isort: skip

PROGRAM = Path(__file__).with_name("exact_program.py")
STEPS = 20
CLOSE = 1e-12


WHOLE, PIECES, HYBRID = {"shard": "none"}, {"shard": "full"}, {"shard": "hybrid", "shard_size": 2}
# Ranks, what each trains, how batches are laid out, and how the weights are spread.
CASES = [
    (2, "full", "packed", WHOLE), (2, "full", "padded", WHOLE), (2, "lora", "packed", WHOLE),
    (2, "qlora", "packed", WHOLE), (2, "full", "packed", PIECES), (2, "tied", "padded", PIECES),
    (2, "lora", "packed", PIECES), (2, "qlora", "packed", PIECES),
    (3, "full", "packed", WHOLE), (3, "lora", "packed", WHOLE), (3, "qlora", "packed", WHOLE),
    (3, "full", "packed", PIECES), (3, "qlora", "packed", PIECES), (4, "full", "packed", HYBRID),
    (4, "qlora", "packed", HYBRID),
]  # fmt: skip


def train(size: int, jobs: list[dict[str, Any]]) -> None:
    """Train each job in turn with `size` ranks that start once; a job continues what is in its folder."""
    words = [sys.executable, str(PROGRAM), json.dumps(jobs)]
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    each = [subprocess.Popen(words, env=os.environ | place | {"RANK": str(rank)}) for rank in range(size)]
    assert [process.wait(timeout=TIMEOUT_S) for process in each] == [0] * size


def job(folder: Path, method: str, batching: str, scale: dict[str, Any], steps: int = STEPS) -> dict[str, Any]:
    """Describe a run up to `steps`."""
    return {
        "folder": str(folder), "method": method, "batching": batching, "scale": scale, "steps": steps, "nan_on": None,
    }  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return where a case was trained; all cases of a number of ranks are trained at the first question."""
    place, trained = tmp_path_factory.mktemp("runs"), set()
    cases = [*CASES, *{(1, method, batching, ()) for _, method, batching, _ in CASES}]

    def find(size: int, method: str, batching: str, scale: dict[str, Any]) -> Path:
        def folder(*case: Any) -> Path:
            return place / "-".join(map(str, case[:3])) / dict(case[3]).get("shard", "none")

        if size not in trained:
            trained.add(size)
            jobs = [job(folder(*case), *case[1:3], dict(case[3])) for case in cases if case[0] == size]
            poisoned = [job(folder(2, "full", "nan", PIECES), "full", "packed", PIECES) | {"nan_on": 1}]
            train(size, jobs + (poisoned if size == 2 else []))
        return folder(size, method, batching, scale)

    return find


def assert_same(ranks: Path, one: Path) -> None:
    """Every step's targets, loss and norm, the final weights and the next gradient are the same to 1e-12."""
    for mine, expected in zip(*(list(read_records(run / "metrics.jsonl")) for run in (ranks, one)), strict=True):
        assert (mine["step"], mine["targets"]) == (expected["step"], expected["targets"])
        assert mine["loss"] == pytest.approx(expected["loss"], rel=CLOSE)
        assert mine["grad_norm"] == pytest.approx(expected["grad_norm"], rel=CLOSE)
    last, wanted = (latest_good(run / "checkpoints") for run in (ranks, one))
    assert last.loader_state == wanted.loader_state
    for mine, expected in (map(weights_in, pair) for pair in ((last.model, wanted.model), (ranks, one))):
        assert mine.keys() == expected.keys()
        for name, tensor in expected.items():
            assert tensor.norm() > 0, name
            assert (mine[name] - tensor).norm() <= CLOSE * tensor.norm(), name


@pytest.mark.parametrize(("size", "method", "batching", "scale"), CASES)
def test_ranks_equal_one_process(runs, size, method, batching, scale):
    """Twenty steps of two micro-batches, with rows of unequal targets and epochs that end within a batch."""
    assert_same(runs(size, method, batching, scale), runs(1, method, batching, WHOLE))


def test_nan_on_one_rank_stops_all_with_the_step_before_saved(runs):
    """Rank 1 alone has NaN at step 4: both ranks say so, and the pieces of step 3 are one good checkpoint."""
    folder = runs(2, "full", "nan", PIECES)
    assert [(folder / f"error-{rank}").read_text().partition(": to")[0][:19] for rank in (0, 1)] == [
        "step 4: non_finite:"
    ] * 2
    assert latest_good(folder / "checkpoints").step == 3


def test_a_run_changes_its_number_of_ranks(runs, tmp_path):
    """Two ranks to step 7, three to step 14, one to the end: the data order, the losses and the end of one process."""
    ways = {"whole": [WHOLE] * 3, "pieces": [PIECES, PIECES, WHOLE]}
    for number, (size, steps) in enumerate(((2, 7), (3, 14), (1, STEPS))):
        train(size, [job(tmp_path / name, "full", "packed", each[number], steps) for name, each in ways.items()])
    for name in ways:
        assert_same(tmp_path / name, runs(1, "full", "packed", WHOLE))


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
