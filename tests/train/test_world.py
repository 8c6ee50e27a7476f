"""Several ranks train as one process would: they agree on every figure, every end, and every lack of memory."""

import json
import math
import os
import signal
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from train_toy import (
    Toy,
    ToyBatch,
    fingerprint,
    in_child,
    losses,
    read_model,
    toy_batches,
    toy_loss,
    toy_settings,
    toy_task,
)

from entrenar.runs import RunFolder
from entrenar.train import Run, World, fit, latest_good, seed_all

RANKS = 2


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _join(rank: int, port: int) -> World:
    """Enter a world of gloo ranks."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    return World(rank, RANKS, dist.all_reduce)


def _on_both_ranks(action: Callable[[World], object]) -> int:
    """Run `action` in two processes; return 0 if both ended well."""
    port = _free_port()

    def first() -> None:
        second = os.fork()
        if second == 0:
            try:
                action(_join(1, port))
                os._exit(0)
            except BaseException:  # noqa: BLE001  # the child must not return into pytest
                traceback.print_exc()
                os._exit(1)
        action(_join(0, port))
        assert os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]) == 0

    return in_child(first)


def _share(world: World, **changes: Any) -> Any:
    """Yield this rank's rows of every toy batch."""
    for batch, position in toy_batches(**changes):
        rows = len(batch.y) // world.size
        mine = slice(world.rank * rows, (world.rank + 1) * rows)
        yield ToyBatch(batch.x[mine], batch.y[mine]), position


def _train(folder: Path, world: World, *, task: dict[str, Any] | None = None, **settings: Any) -> Any:
    seed_all(5)
    module = Toy(dropout=0.0, dtype=torch.float64)
    made = toy_task(module, batches=_share(world), **{key: value(module) for key, value in (task or {}).items()})
    return fit(made, toy_settings(**settings), Run(folder, {}), world)


def test_a_single_process_is_its_own_world() -> None:
    """Alone, each question is its own answer, and nothing is reduced."""
    world = World.alone()
    assert (world.rank, world.size, world.is_writer) == (0, 1, True)
    assert world.sum(a=1.5, b=2.0) == {"a": 1.5, "b": 2.0}
    assert world.any(flag=True)
    assert not world.any(flag=False)
    assert world.largest(7) == 7
    assert world.broadcast({"loss": 1.0}) == {"loss": 1.0}


@pytest.mark.parametrize("rank", range(3))
def test_what_all_ranks_hold_is_what_each_is_told(rank: int) -> None:
    """Given a sum over three ranks that hold 1, 2 and 3, every question has the answer of all of them."""
    held = [1.0, 2.0, 3.0]

    def reduce(tensor: Tensor) -> None:
        if tensor.numel() == 1:
            tensor.copy_(tensor - held[rank] + sum(held))
        else:  # one place for each rank
            tensor.copy_(torch.tensor(held, dtype=tensor.dtype))

    world = World(rank, 3, reduce)
    assert world.sum(held=held[rank]) == {"held": 6.0}
    assert world.largest(int(held[rank])) == 3
    assert world.is_writer == (rank == 0)


def test_ranks_hear_the_same(tmp_path: Path) -> None:
    """Sum, any, largest, broadcast and add_up over real gloo ranks; a broadcast keeps NaN, text and nesting."""
    figures = {"loss": math.inf, "task": {"name": "für", "shares": [0.25, None]}}

    def ask(world: World) -> None:
        tensor = torch.full((3,), float(world.rank + 1))
        world.add_up([tensor])
        answers = [
            world.sum(a=world.rank + 0.5, b=1e-300),
            world.any(flag=world.rank == 1),
            world.any(flag=False),
            world.largest(10 - world.rank),
            world.broadcast(figures if world.is_writer else {"loss": 0.0}),
            tensor.tolist(),
        ]
        (tmp_path / f"{world.rank}.json").write_text(json.dumps(answers))

    assert _on_both_ranks(ask) == 0
    expected = [{"a": 2.0, "b": 2e-300}, True, False, 10, figures, [3.0, 3.0, 3.0]]
    for rank in range(RANKS):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    """Weights, losses and norms of two ranks with half the rows each equal those of one process to 1e-12 in float64."""
    _train(tmp_path / "one", World.alone(), grad_accum_steps=2)
    assert _on_both_ranks(lambda world: _train(tmp_path / "two", world, grad_accum_steps=2)) == 0
    one, two = (latest_good(tmp_path / name / "checkpoints") for name in ("one", "two"))
    for name, weight in read_model(one.model).items():
        assert torch.allclose(read_model(two.model)[name], weight, rtol=1e-12, atol=1e-14), name
    for first, second in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert second == pytest.approx(first, rel=1e-12)
    counters = [{k: v for k, v in c.state["counters"].items() if k != "elapsed_s"} for c in (one, two)]
    assert counters[0] == counters[1]


def test_one_reduction_a_step_carries_the_agreement(tmp_path: Path) -> None:
    """Beside the gradients, a step without evaluation or trouble costs one reduction."""
    small: list[int] = []
    module = Toy(dropout=0.0)

    def reduce(tensor: Tensor) -> None:
        if tensor.dtype == torch.float64:  # the gradients are float32
            small.append(tensor.numel())

    world = World(0, 2, reduce)
    fit(toy_task(module), toy_settings(max_steps=5, eval_every=0, save_every=0), Run(tmp_path, {}), world)
    begin_and_end = [size for size in small if size == 1]
    assert len(small) - len(begin_and_end) == 5


def test_memory_short_on_one_rank_halves_all(tmp_path: Path) -> None:
    """When only the second rank has too little memory, both repeat the step in halves and the result is the same."""

    def hungry_rank(world: World) -> None:
        sizes = []

        def hungry(module: Toy) -> Callable[[ToyBatch], Tensor]:
            def loss(batch: ToyBatch) -> Tensor:
                sizes.append(len(batch.y))
                if world.rank == 1 and len(batch.y) > 1:
                    raise MemoryError
                return toy_loss(module)(batch)

            return loss

        _train(tmp_path / "two", world, task={"loss": hungry}, max_steps=3)
        (tmp_path / f"sizes-{world.rank}").write_text(json.dumps(sizes))

    _train(tmp_path / "one", World.alone(), max_steps=3)
    assert _on_both_ranks(hungry_rank) == 0
    assert [json.loads((tmp_path / f"sizes-{rank}").read_text()) for rank in range(RANKS)] == [[2, *[1] * 6]] * 2
    assert [e.message for e in RunFolder(tmp_path / "two").read_events() if e.kind == "oom_split"] == [
        "memory ran out (on another rank); the step is repeated with 1 rows at a time"
    ]
    one, two = (read_model(latest_good(tmp_path / name / "checkpoints").model) for name in ("one", "two"))
    assert all(torch.allclose(two[name], one[name], rtol=1e-12, atol=1e-14) for name in one)


@pytest.mark.parametrize("cause", ["signal", "data", "non_finite", "early_stop"])
def test_ranks_end_together(tmp_path: Path, cause: str) -> None:
    """A signal, NaN or an end of data on one rank alone ends both after the same step."""

    def run(world: World) -> None:
        module = Toy(dropout=0.0, dtype=torch.float64)
        loss, count = toy_loss(module), 0

        def troubled(batch: ToyBatch) -> Tensor:
            nonlocal count
            count += 1
            if world.rank == 1 and count == 3 and cause == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            return loss(batch) * (math.nan if world.rank == 1 and count == 3 and cause == "non_finite" else 1.0)

        changes: dict[str, Any] = {"loss": troubled, "batches": _share(world, end=3 if cause == "data" else None)}
        if cause == "early_stop":  # the ranks see different figures; the writer's count
            changes["evaluate"] = lambda: {"loss": 1.0 if world.is_writer else -float(count)}
        task = toy_task(module, **changes)
        settings = toy_settings(eval_every=1, early_stop_patience=2, max_skipped_steps=0, save_every=0)
        try:
            outcome = fit(task, settings, Run(tmp_path / "run", {}), world)
            ending = [outcome.reason, outcome.step]
        except Exception as error:  # noqa: BLE001  # compared below
            ending = [type(error).__name__, int(str(error).split()[1].rstrip(":")) - 1]
        (tmp_path / f"{world.rank}.json").write_text(json.dumps(ending))

    assert _on_both_ranks(run) == 0
    endings = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    expected = {"signal": 3, "data": 3, "non_finite": 2, "early_stop": 3}[cause]
    assert endings == [[{"non_finite": "NonFiniteError"}.get(cause, cause), expected]] * RANKS
    assert fingerprint(tmp_path / "run")["step"] == expected


def test_only_the_writer_writes(tmp_path: Path) -> None:
    """A rank that is not the writer makes no folder and calls no listener."""

    def run(world: World) -> None:
        heard: list[object] = []
        task = toy_task(Toy(dropout=0.0), batches=_share(world))
        fit(
            task, toy_settings(max_steps=3), Run(tmp_path / f"run-{world.rank}", {}), world,
            on_record=heard.append, on_event=heard.append,
        )  # fmt: skip
        (tmp_path / f"{world.rank}.json").write_text(json.dumps(len(heard)))

    assert _on_both_ranks(run) == 0
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)] == [4, 0]
    assert latest_good(tmp_path / "run-0" / "checkpoints").step == 3
    assert not (tmp_path / "run-1").exists()
