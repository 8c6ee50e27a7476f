"""N + M steps equal N steps, a kill, and M more, byte for byte: weights, moments, masters, random states, windows."""

import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import train_toy
from train_toy import BATCHES_PER_EPOCH, fingerprint, in_child, losses, run_toy, signals_by_default

from entrenar.runs import list_checkpoints
from entrenar.train import rng
from entrenar.train.optim import Optimizer

ACCUMULATION = 3
STEPS = 12
MOST_KILLS = 20
KINDS = [("float32", "adamw"), ("bfloat16", "adamw"), ("bfloat16", "muon")]


@pytest.fixture(autouse=True)
def _started_from_a_terminal() -> Iterator[None]:
    with signals_by_default():
        yield


def _kill_at(count: int, folder: Path, *, saved: int) -> Callable[[int], None]:
    """Kill before loss number `count`, as soon as the background has committed checkpoint `saved`."""

    def before_loss(done: int) -> None:
        if done == count:
            while saved not in list_checkpoints(folder / "checkpoints"):
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)

    return before_loss


def _options(precision: str, optimizer: str) -> dict[str, object]:
    return {"precision": precision, "optimizer": optimizer, "grad_accum_steps": ACCUMULATION, "max_steps": STEPS}


@pytest.mark.chaos
@pytest.mark.parametrize(("precision", "optimizer"), KINDS)
def test_resume_is_bit_exact_after_kill(tmp_path: Path, precision: str, optimizer: str) -> None:
    """Killed mid-step, mid-epoch, resumed, killed again and resumed again, a run ends as one that was left alone."""
    options = _options(precision, optimizer)
    assert in_child(lambda: run_toy(tmp_path / "whole", **options)) == 0

    first = 7 * ACCUMULATION + 2  # in step 8, after two of its three micro-batches; checkpoint 5 is the last one
    assert first % BATCHES_PER_EPOCH != 0
    folder = tmp_path / "killed"
    assert in_child(lambda: run_toy(folder, before_loss=_kill_at(first, folder, saved=5), **options)) == -signal.SIGKILL
    assert list(list_checkpoints(folder / "checkpoints")) == [5]
    second = 6 * ACCUMULATION + 1  # counted from step 6 on: in step 12; checkpoint 10 is the last one
    assert (
        in_child(lambda: run_toy(folder, resume=True, before_loss=_kill_at(second, folder, saved=10), **options))
        == -signal.SIGKILL
    )
    assert max(list_checkpoints(folder / "checkpoints")) == 10
    assert in_child(lambda: run_toy(folder, resume=True, **options)) == 0

    assert fingerprint(folder) == fingerprint(tmp_path / "whole")
    assert losses(folder) == losses(tmp_path / "whole")
    assert [step for step, _ in losses(folder)] == list(range(1, STEPS + 1))


@pytest.mark.chaos
@pytest.mark.parametrize("lost", ["rng", "loader", "moments", "remainder"])
def test_the_comparison_notices_what_is_not_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """Negative control: a resume that forgets any one part of the state does not pass for exact."""
    options = _options("bfloat16", "adamw")
    assert in_child(lambda: run_toy(tmp_path / "whole", **options)) == 0
    folder = tmp_path / "killed"
    in_child(lambda: run_toy(folder, before_loss=_kill_at(20, folder, saved=5), **options))

    def forgetful() -> None:
        if lost == "rng":
            rng.restore = lambda _: None
        elif lost == "loader":
            batches = train_toy.toy_batches
            train_toy.toy_batches = lambda _, **named: batches(None, **named)
        else:
            load, part = Optimizer.load_state_dict, {"moments": ".mean", "remainder": ".remainder"}[lost]
            Optimizer.load_state_dict = lambda self, saved: load(
                self, {name: tensor.zero_() if part in name else tensor for name, tensor in saved.items()}
            )
        run_toy(folder, resume=True, **options)

    assert in_child(forgetful) == 0
    assert fingerprint(folder) != fingerprint(tmp_path / "whole")


@pytest.mark.chaos
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_any_number_of_kills_at_random_times_changes_nothing(tmp_path: Path, precision: str) -> None:
    """Killed again and again at random instants, also while a checkpoint is being written, a run ends the same."""
    options = _options(precision, "adamw") | {"max_steps": 80, "save_every": 3, "keep_last": 1}
    assert in_child(lambda: run_toy(tmp_path / "whole", **options)) == 0
    folder, chance, kills = tmp_path / "killed", random.Random(0), 0

    def run_for(micro_batches: int, seconds: float) -> None:
        calls = itertools.count(1)

        def arm(_: int) -> None:
            # Counted work first, so that a fast machine is killed as often; then the alarm, whose default action ends
            # the process at any instruction.
            if next(calls) == micro_batches:
                signal.setitimer(signal.ITIMER_REAL, seconds)

        run_toy(folder, resume=True, before_loss=arm, **options)

    while kills < MOST_KILLS and in_child(partial(run_for, chance.randint(5, 40), chance.uniform(1e-4, 0.01))) != 0:
        kills += 1
    if kills == MOST_KILLS:
        assert in_child(lambda: run_toy(folder, resume=True, **options)) == 0
    assert kills >= 3
    assert fingerprint(folder) == fingerprint(tmp_path / "whole")
    assert losses(folder) == losses(tmp_path / "whole")
    assert not [path for path in (folder / "checkpoints").iterdir() if not path.name.startswith("step-")]


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_ends_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    """After SIGINT or SIGTERM the step is finished and saved, the process ends with 0, and a resume loses nothing."""
    options = _options("float32", "adamw")
    assert in_child(lambda: run_toy(tmp_path / "whole", **options)) == 0

    def interrupt(done: int) -> None:
        if done == 7 * ACCUMULATION + 1:
            os.kill(os.getpid(), number)

    folder = tmp_path / "stopped"
    assert in_child(lambda: run_toy(folder, before_loss=interrupt, **options)) == 0
    assert max(list_checkpoints(folder / "checkpoints")) == 8
    assert in_child(lambda: run_toy(folder, resume=True, **options)) == 0
    assert fingerprint(folder) == fingerprint(tmp_path / "whole")


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_process_at_once(tmp_path: Path, number: signal.Signals) -> None:
    """The second signal kills by its default action, in the middle of a step."""

    def insist(done: int) -> None:
        if done == 4:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            time.sleep(30)

    started = time.perf_counter()
    assert in_child(lambda: run_toy(tmp_path, before_loss=insist)) == -number
    assert time.perf_counter() - started < 15
    assert not list_checkpoints(tmp_path / "checkpoints")
