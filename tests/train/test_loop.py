"""The loop does what its order says: nothing moves on a bad step, every limit ends it, and what it learned is saved."""

import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_toy import (
    BATCHES_PER_EPOCH,
    Toy,
    ToyBatch,
    held_out,
    losses,
    read_model,
    signals_by_default,
    toy_batches,
    toy_loss,
    toy_settings,
    toy_task,
    write_model,
)

from entrenar.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DiskFullError,
    MachineError,
    NonFiniteError,
    OutOfMemoryError,
    TrainingHalted,
)
from entrenar.runs import Event, RunFolder, StepRecord, list_checkpoints, read_records
from entrenar.train import Outcome, Run, Task, checkpoint, fit, latest_good
from entrenar.train.optim import Optimizer


def _fit(folder: Path, module: Toy | None = None, *, task: dict[str, Any] | None = None, **settings: Any) -> Outcome:
    module = module or Toy()
    whole: Task[ToyBatch] = toy_task(module, **({"evaluate": held_out(module)} | (task or {})))
    return fit(whole, toy_settings(**settings), Run(folder, {}))


def _events(folder: Path) -> list[tuple[int, str]]:
    return [(event["step"], event["kind"]) for event in read_records(folder / "events.jsonl")]


def _at_loss(module: Toy, number: int, act: Callable[[], None]) -> Callable[[ToyBatch], Tensor]:
    """Return the toy loss; before its computation of this number something happens."""
    loss, count = toy_loss(module), 0

    def run(batch: ToyBatch) -> Tensor:
        nonlocal count
        count += 1
        if count == number:
            act()
        return loss(batch)

    return run


def _bad_loss(module: Toy, bad_steps: tuple[int, ...], value: float) -> Callable[[ToyBatch], Tensor]:
    """Return the toy loss, turned into `value` times its weights in the given steps."""
    loss, step = toy_loss(module), 0

    def run(batch: ToyBatch) -> Tensor:
        nonlocal step
        step += 1
        return loss(batch) * (value if step in bad_steps else 1.0)

    return run


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    """On data that repeats, the held-out loss of the training rows falls by more than half."""
    module = Toy(dropout=0.0)
    batch = next(toy_batches())[0]
    before = toy_loss(module)(batch).item()
    _fit(tmp_path, module, max_steps=150, lr=3e-2, save_every=0)
    assert toy_loss(module)(batch).item() < before / 2


def test_a_step_is_the_one_done_by_hand(tmp_path: Path) -> None:
    """Loss, norm, clipping, rate and weights of a step equal torch's own tools on the mean over all targets."""
    module, other = Toy(dropout=0.0), Toy(dropout=0.0)
    outcome = _fit(
        tmp_path, module, max_steps=1, grad_accum_steps=3, lr=1e-2, warmup_steps=4, grad_clip=0.05, weight_decay=0.2
    )
    batches = [batch for batch, _ in toy_batches(end=3)]
    whole = ToyBatch(torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches]))
    loss = toy_loss(other)(whole) / whole.num_targets
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.05)
    groups = [
        {"params": [other.up.weight, other.down.weight], "weight_decay": 0.2},
        {"params": [other.norm.weight, other.norm.bias], "weight_decay": 0.0},
    ]
    torch.optim.AdamW(groups, lr=1e-2 / 4, betas=(0.9, 0.95), fused=True).step()
    record = outcome.last_record
    assert record.loss == pytest.approx(loss.item(), rel=1e-6)
    assert record.grad_norm == pytest.approx(norm.item(), rel=1e-6)
    assert norm.item() > 0.05
    assert record.lr == 1e-2 / 4
    for one, two in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-7)


def test_records_hold_what_happened(tmp_path: Path) -> None:
    """Counters, epochs, rates, phase times and held-out figures are in the records and reach the callback."""
    heard: list[StepRecord] = []
    module = Toy()
    task = toy_task(module, evaluate=held_out(module))
    fit(task, toy_settings(grad_accum_steps=2), Run(tmp_path, {}), on_record=heard.append)
    records = list(read_records(tmp_path / "metrics.jsonl"))
    assert records == [dataclasses.asdict(record) for record in heard]
    assert [record["step"] for record in records] == list(range(1, 13))
    assert records[11]["targets"] == sum(batch.num_targets for batch, _ in toy_batches(end=24))
    assert records[11]["epoch"] == 24 / BATCHES_PER_EPOCH
    assert [r["step"] for r in records if r["held_out"]] == [4, 5, 8, 10, 12]  # every 4th, each save, and the end
    assert records[0]["phases_s"].keys() >= {"data", "forward", "backward", "optimizer"}
    assert all(seconds > 0 for record in records for seconds in record["phases_s"].values())
    assert "evaluate" in records[3]["phases_s"]
    assert records[0]["eta_s"] > records[10]["eta_s"] > records[11]["eta_s"] == 0.0
    assert records[11]["elapsed_s"] > records[0]["elapsed_s"] > 0.0


def test_log_every_thins_the_records_but_keeps_evaluations_and_the_last(tmp_path: Path) -> None:
    """With a record every fifth step, evaluated steps and the final one are still written."""
    _fit(tmp_path, max_steps=12, log_every=5, eval_every=4, save_every=0)
    assert [step for step, _ in losses(tmp_path)] == [4, 5, 8, 10, 12]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_step_moves_nothing_and_ends_the_run(tmp_path: Path, value: float) -> None:
    """At step 6 nothing moves: weights, moments and loader position of step 5 are saved; the error names the step."""
    module = Toy()
    with pytest.raises(
        NonFiniteError, match=rf"step 6: non_finite: loss is {value}, .*; to continue, resume from .*checkpoints"
    ):
        _fit(tmp_path, module, task={"loss": _bad_loss(module, (6,), value)}, save_every=0)
    whole = Toy()
    _fit(tmp_path / "five", whole, max_steps=5, save_every=0, schedule="constant")
    saved = latest_good(tmp_path / "checkpoints")
    assert (saved.step, saved.loader_state) == (5, {"index": 5})
    assert torch.equal(read_model(saved.model)["up.weight"], module.up.weight)
    assert saved.optimizer()["step"] == 5.0
    assert _events(tmp_path) == [(6, "non_finite"), (5, "checkpoint_saved"), (6, "bundle_written")]


def _wrecking(module: Toy, value: float) -> Callable[[ToyBatch], Tensor]:
    """Return the toy loss; once step 7 has moved the weights, they are `value` times what they were."""
    loss, step = toy_loss(module), 0

    def run(batch: ToyBatch) -> Tensor:
        nonlocal step
        step += 1
        if step == 8:
            with torch.no_grad():
                module.down.weight.mul_(value)
        return loss(batch) * (math.nan if step == 8 else 1.0)

    return run


@pytest.mark.parametrize("save_every", [6, 1])
@pytest.mark.parametrize("value", [math.nan, 1e30])
def test_a_diverged_run_keeps_its_ruin_apart(tmp_path: Path, value: float, save_every: int) -> None:
    """Step 7 wrecks the weights, step 8 notices: the newest checkpoint is step 6, even with keep_last 1.

    The ruin is in `rescue`, also if step 7 had been saved already; an event says why, and a resume takes step 6.
    """
    module = Toy()
    with pytest.raises(NonFiniteError, match="step 8"):
        _fit(
            tmp_path, module, task={"loss": _wrecking(module, value)}, save_every=save_every, keep_last=1,
            keep_best=False,
        )  # fmt: skip
    assert list(list_checkpoints(tmp_path / "checkpoints")) == [6]
    assert [path.name for path in (tmp_path / "rescue").iterdir()] == ["step-00000007"]
    reason = "not finite" if math.isnan(value) else "the loss of the batch that was just trained on went from"
    (event,) = [e for e in RunFolder(tmp_path).read_events() if e.kind == "checkpoint_rejected"]
    assert event.step == 7
    assert reason in event.message
    resumed = latest_good(tmp_path / "checkpoints")
    outcome = fit(toy_task(module, resumed.loader_state), toy_settings(), Run(tmp_path, {}, resumed))
    assert (outcome.reason, outcome.step) == ("steps", 12)


def test_numbers_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    """A learning rate of 1e38 overflows the weights in a step of finite loss: the save refuses, the old one stays."""
    module = Toy()
    _fit(tmp_path, module, max_steps=2, save_every=1, schedule="constant", keep_last=1, keep_best=False)
    resumed = latest_good(tmp_path / "checkpoints")
    settings = toy_settings(lr=3e38, weight_decay=1.0, save_every=1, schedule="constant", keep_last=1, keep_best=False)
    with pytest.raises(NonFiniteError, match=r"step 3: not saved, because \d+ of \d+ tensors are not finite"):
        fit(toy_task(module, resumed.loader_state), settings, Run(tmp_path, {}, resumed))
    assert latest_good(tmp_path / "checkpoints").step == 2
    assert [path.name for path in (tmp_path / "rescue").iterdir()] == ["step-00000003"]


@pytest.mark.chaos
def test_a_checkpoint_on_demand_is_saved_after_the_step_and_the_run_goes_on(tmp_path: Path) -> None:
    """SIGUSR1 in step 3 saves step 3, once; the run ends as it would have."""
    module = Toy()
    asking = _at_loss(module, 3, lambda: os.kill(os.getpid(), signal.SIGUSR1))

    outcome = _fit(tmp_path, module, task={"loss": asking}, save_every=0, keep_last=9)
    assert (outcome.reason, outcome.step) == ("steps", 12)
    assert list(list_checkpoints(tmp_path / "checkpoints")) == [3, 12]


def test_tidying_that_fails_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that cannot be deleted is an event; training goes on, and everything is saved."""

    def stuck(path: Path) -> None:
        raise MachineError(f"cannot write {path}: Input/output error")

    monkeypatch.setattr(checkpoint, "remove", stuck)
    outcome = _fit(tmp_path, save_every=3, keep_last=1, keep_best=False)
    assert outcome.step == 12
    assert list(list_checkpoints(tmp_path / "checkpoints")) == [3, 6, 9, 12]
    assert [kind for _, kind in _events(tmp_path)].count("prune_failed") == 3


def test_non_finite_steps_may_be_skipped(tmp_path: Path) -> None:
    """Two bad steps in a row are left out: no weight moves in them, the run goes on, and the records say so."""
    module, trace = Toy(), []
    loss = _bad_loss(module, (3, 4), math.nan)
    task = toy_task(module, loss=loss)
    fit(
        task, toy_settings(max_steps=6, max_skipped_steps=2, save_every=0), Run(tmp_path, {}),
        on_record=lambda _: trace.append(module.up.weight.detach().clone()),
    )  # fmt: skip
    moved = [not torch.equal(a, b) for a, b in pairwise(trace)]
    assert moved == [True, False, False, True, True]
    assert [loss for _, loss in losses(tmp_path)][2:4] == [None, None]
    assert latest_good(tmp_path / "checkpoints").optimizer()["step"] == 4.0


def test_a_halting_cord_stops_before_the_weights_move(tmp_path: Path) -> None:
    """A loss spike whose cord is chosen to halt stops the run with the state of the step before, resumable."""
    module = Toy()
    with pytest.raises(TrainingHalted, match=r"step 10: loss_spike: loss .* deviations above"):
        _fit(
            tmp_path, module, task={"loss": _bad_loss(module, (10,), 1e6)}, halt_on=("loss_spike",), monitor_window=8
        )  # fmt: skip
    assert latest_good(tmp_path / "checkpoints").step == 9
    assert (10, "loss_spike") in _events(tmp_path)


def test_a_cord_after_the_step_saves_that_step(tmp_path: Path) -> None:
    """A plateau that halts is noticed after the weights have moved, and just that state is saved."""
    module = Toy(dropout=0.0)
    with pytest.raises(TrainingHalted, match="plateau"):
        _fit(
            tmp_path, module, max_steps=50, save_every=0, lr=1e-12, halt_on=("plateau",), plateau_steps=16,
            plateau_min_drop=0.5,
        )  # fmt: skip
    saved = latest_good(tmp_path / "checkpoints")
    assert saved.step == 17
    assert saved.optimizer()["step"] == 17.0
    assert torch.equal(read_model(saved.model)["up.weight"], module.up.weight)


def test_epochs_end_the_run(tmp_path: Path) -> None:
    """Two epochs of seven micro-batches, three a step, are five steps."""
    outcome = _fit(tmp_path, max_steps=None, epochs=2, grad_accum_steps=3)
    assert (outcome.reason, outcome.step) == ("steps", 5)


def test_epochs_of_unknown_length_are_refused(tmp_path: Path) -> None:
    """Without the length of an epoch, `epochs` cannot be a limit."""
    with pytest.raises(ConfigError, match="epochs needs a corpus of known length; set max_steps instead"):
        _fit(tmp_path, max_steps=None, epochs=2, task={"micro_batches_per_epoch": None})


def test_time_ends_the_run_and_the_schedule_follows_the_clock(tmp_path: Path) -> None:
    """With only a time limit the run stops by it, saves, and its rate has fallen from full to near the final one."""
    outcome = _fit(tmp_path, max_steps=None, max_time_s=1.0, eval_every=0, save_every=0, warmup_steps=0)
    assert outcome.reason == "time"
    assert latest_good(tmp_path / "checkpoints").step == outcome.step > 10
    rates = [record["lr"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert rates[0] == pytest.approx(1e-2)
    assert min(rates) < 0.3e-2
    assert outcome.last_record.held_out is not None


def test_data_that_ends_ends_the_run_with_a_smaller_last_step(tmp_path: Path) -> None:
    """Seven micro-batches by threes make three steps, the last of one; the end is evaluated and saved."""
    outcome = _fit(tmp_path, task={"end": 7}, grad_accum_steps=3, save_every=0, eval_every=0)
    assert (outcome.reason, outcome.step) == ("data", 3)
    saved = latest_good(tmp_path / "checkpoints")
    assert (saved.step, saved.loader_state, saved.state["counters"]["micro_batches"]) == (3, {"index": 7}, 7)
    assert saved.state["held_out"]["loss"] == outcome.best_held_out_loss


def test_no_data_at_all_is_an_error(tmp_path: Path) -> None:
    """A loader without a batch is the data's fault, not a finished run."""
    with pytest.raises(DataError, match="there is no batch to train on after step 0"):
        _fit(tmp_path, task={"end": 0})


def test_a_step_without_a_target_is_an_error(tmp_path: Path) -> None:
    """When every target of a step is masked, the run stops and says where."""
    batch, position = next(toy_batches())
    batches = iter([(batch, position), (ToyBatch(batch.x, torch.full_like(batch.y, -100)), position)])
    with pytest.raises(DataError, match="step 2: none of the 1 micro-batches has a target; check the masks"):
        _fit(tmp_path, task={"batches": batches})
    assert latest_good(tmp_path / "checkpoints").step == 1


def test_early_stopping_counts_evaluations_without_a_new_best(tmp_path: Path) -> None:
    """With held-out losses 3 2 2 4 1, patience two ends the run at the fourth evaluation; the best one is kept."""
    figures = iter([3.0, 2.0, 2.0, 4.0, 1.0])
    outcome = _fit(
        tmp_path, task={"evaluate": lambda: {"loss": next(figures)}}, max_steps=50, eval_every=2, save_every=2,
        early_stop_patience=2, keep_last=1,
    )  # fmt: skip
    assert (outcome.reason, outcome.step, outcome.best_held_out_loss) == ("early_stop", 8, 2.0)
    assert list(list_checkpoints(tmp_path / "checkpoints")) == [4, 8]


def test_evaluation_leaves_no_trace_in_the_training(tmp_path: Path) -> None:
    """An evaluation that draws random numbers, in evaluation mode and without a tape, changes no later weight."""
    modules = [Toy(), Toy()]
    seen = []

    def noisy() -> dict[str, float]:
        seen.append((modules[1].training, torch.is_grad_enabled()))
        torch.rand(100)
        return {"loss": 1.0}

    for index, evaluate in enumerate((None, noisy)):
        torch.manual_seed(0)
        _fit(tmp_path / str(index), modules[index], task={"evaluate": evaluate}, eval_every=1)
    assert set(seen) == {(False, False)}
    assert modules[1].training
    assert torch.equal(modules[0].up.weight, modules[1].up.weight)


def test_retention_and_final_save(tmp_path: Path) -> None:
    """Of saves at 3, 6, 9 and the end at 11, the last two are kept, and the best one beside them."""
    figures = {3: 5.0, 6: 1.0, 9: 4.0, 11: 3.0}
    step = iter(figures)
    _fit(
        tmp_path, task={"evaluate": lambda: {"loss": figures[next(step)]}}, max_steps=11, eval_every=0, save_every=3,
        keep_last=2,
    )  # fmt: skip
    assert list(list_checkpoints(tmp_path / "checkpoints")) == [6, 9, 11]
    assert latest_good(tmp_path / "checkpoints").state["held_out"] == {"loss": 3.0}


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    """A second run in the same folder without resuming is refused before anything is written."""
    _fit(tmp_path, max_steps=2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="already holds checkpoints; resume that run or choose another folder"):
        _fit(tmp_path, max_steps=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_resuming_another_model_is_refused_and_saves_nothing(tmp_path: Path) -> None:
    """A checkpoint of a wider model does not fit, and its folder is left as it was."""
    _fit(tmp_path, Toy(width=8), max_steps=2)
    resumed = latest_good(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match=r"weight up.weight must be torch.float32 \(16, 6\)"):
        fit(toy_task(Toy()), toy_settings(), Run(tmp_path, {}, resumed))
    assert list(list_checkpoints(tmp_path / "checkpoints")) == [2]


def test_a_finished_run_that_is_resumed_does_nothing(tmp_path: Path) -> None:
    """Resuming at the last step takes no step and writes no checkpoint."""
    _fit(tmp_path, max_steps=2)
    resumed = latest_good(tmp_path / "checkpoints")
    changed = resumed.path.stat().st_mtime_ns
    outcome = fit(toy_task(Toy()), toy_settings(max_steps=2), Run(tmp_path, {}, resumed))
    assert (outcome.reason, outcome.step, outcome.last_record) == ("steps", 2, None)
    assert resumed.path.stat().st_mtime_ns == changed


def test_a_damaged_checkpoint_is_told_and_stepped_over(tmp_path: Path) -> None:
    """With the newest checkpoint damaged, the one before is resumed, both are events, and the run ends as ever."""
    whole, module = Toy(dropout=0.0), Toy(dropout=0.0)
    _fit(tmp_path / "whole", whole, schedule="constant")
    _fit(tmp_path, module, max_steps=10, keep_last=9, schedule="constant")
    (tmp_path / "checkpoints" / "step-00000010" / "optimizer.safetensors").write_bytes(b"")
    resumed = latest_good(tmp_path / "checkpoints")
    assert resumed.step == 5
    fit(toy_task(module, resumed.loader_state), toy_settings(schedule="constant"), Run(tmp_path, {}, resumed))
    assert _events(tmp_path)[1:3] == [(5, "checkpoint_damaged"), (5, "checkpoint_abandoned")]
    assert torch.equal(module.up.weight, whole.up.weight)
    assert latest_good(tmp_path / "checkpoints").step == 12


@pytest.mark.chaos
def test_a_full_disk_on_the_way_is_a_warning_and_the_run_goes_on(tmp_path: Path) -> None:
    """A save that fails leaves the old checkpoint and an event; the next one succeeds."""
    calls = []

    def sometimes_full(folder: Path, weights: Any) -> None:
        calls.append(folder)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write_model(folder, weights)

    _fit(tmp_path, task={"write_model": sometimes_full}, save_every=4, keep_last=9)
    assert list(list_checkpoints(tmp_path / "checkpoints")) == [4, 12]
    assert [kind for _, kind in _events(tmp_path)] == ["checkpoint_saved", "checkpoint_failed", "checkpoint_saved"]


@pytest.mark.chaos
def test_a_full_disk_at_the_end_is_an_error_and_the_old_checkpoint_stays(tmp_path: Path) -> None:
    """When the last save fails too, the run ends with DiskFullError (exit 3) and the checkpoint before it is whole."""
    calls = []

    def full_from_now_on(folder: Path, weights: Any) -> None:
        calls.append(folder)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        write_model(folder, weights)

    with pytest.raises(DiskFullError, match=r"no space left to write .*step-00000012.*; free space and try again"):
        _fit(tmp_path, task={"write_model": full_from_now_on}, save_every=4)
    assert latest_good(tmp_path / "checkpoints").step == 4
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000004"]


def test_out_of_memory_in_the_optimizer_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that may be half moved are not saved; the error says to resume from the last checkpoint."""
    step, calls = Optimizer.step, []

    def starved(self: Optimizer, lr: float, scale: float) -> None:
        step(self, lr, scale)
        calls.append(lr)
        if len(calls) == 7:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Optimizer, "step", starved)
    with pytest.raises(OutOfMemoryError, match=r"optimizer was in step 7: some weights have moved .* resume from"):
        _fit(tmp_path)
    assert list(list_checkpoints(tmp_path / "checkpoints")) == [5]


def test_other_errors_in_the_optimizer_come_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A programming error keeps its type."""
    monkeypatch.setattr(Optimizer, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        _fit(tmp_path)


def test_splitting_for_memory_is_an_event_and_is_remembered(tmp_path: Path) -> None:
    """A step that does not fit is done in halves, told once, and later steps and resumed runs keep the size."""
    module, events, sizes = Toy(), [], []
    loss = toy_loss(module)

    def hungry(batch: ToyBatch) -> Tensor:
        sizes.append(len(batch.y))
        if len(batch.y) > 2:
            raise MemoryError
        return loss(batch)

    task = toy_task(module, loss=hungry)
    fit(task, toy_settings(max_steps=2), Run(tmp_path, {}), on_event=events.append)
    assert sizes == [4, 2, 2, 2, 2]
    assert (events[0].step, events[0].kind) == (1, "oom_split")
    resumed = latest_good(tmp_path / "checkpoints")
    fit(toy_task(module, resumed.loader_state, loss=hungry), toy_settings(max_steps=3), Run(tmp_path, {}, resumed))
    assert sizes[5:] == [2, 2]


def test_a_signal_handler_is_put_back(tmp_path: Path) -> None:
    """After the run, and after a signal ended it, SIGINT and SIGTERM are handled as before."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    module = Toy()
    loss = toy_loss(module)

    def interrupted(batch: ToyBatch) -> Tensor:
        os.kill(os.getpid(), signal.SIGTERM)
        return loss(batch)

    outcome = _fit(tmp_path, module, task={"loss": interrupted})
    assert (outcome.reason, outcome.step) == ("signal", 1)
    assert outcome.last_record.held_out is None
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.chaos
def test_a_listener_that_fails_costs_no_step(tmp_path: Path) -> None:
    """When the terminal is gone, the callback's error comes through, and the last whole step is saved."""

    def gone(record: StepRecord) -> None:
        if record.step == 3:
            raise BrokenPipeError

    def deaf(event: Event) -> None:
        if event.step == 3:
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        fit(
            toy_task(Toy()), toy_settings(save_every=2), Run(tmp_path, {}),
            on_record=gone, on_event=deaf,
        )  # fmt: skip
    assert latest_good(tmp_path / "checkpoints").step == 3


def test_a_new_run_takes_at_least_one_step(tmp_path: Path) -> None:
    """A time limit that is over at once still trains, and saves, one step."""
    outcome = _fit(tmp_path, max_steps=None, max_time_s=1e-300)
    assert (outcome.reason, outcome.step) == ("time", 1)
    assert latest_good(tmp_path / "checkpoints").step == 1


def test_a_non_finite_held_out_loss_is_never_the_best_and_can_be_saved(tmp_path: Path) -> None:
    """With held-out losses NaN, 2, infinity the best is 2, patience counts the others, and every step is saved."""
    figures = iter([math.nan, 2.0, math.inf])
    outcome = _fit(
        tmp_path, task={"evaluate": lambda: {"loss": next(figures)}}, max_steps=3, eval_every=1, save_every=1,
        keep_last=1,
    )  # fmt: skip
    assert outcome.best_held_out_loss == 2.0
    assert list(list_checkpoints(tmp_path / "checkpoints")) == [2, 3]
    saved = latest_good(tmp_path / "checkpoints").state
    assert (saved["held_out"], saved["counters"]["evaluations_since_best"]) == ({"loss": None}, 1)


def test_out_of_memory_in_the_evaluation_is_typed_and_the_step_is_saved(tmp_path: Path) -> None:
    """When only the evaluation does not fit, the error says so, and the step before it is not lost."""

    def hungry() -> dict[str, float]:
        raise MemoryError

    with pytest.raises(OutOfMemoryError, match="while evaluating held-out data; use smaller evaluation batches"):
        _fit(tmp_path, task={"evaluate": hungry})
    assert latest_good(tmp_path / "checkpoints").step == 4


@pytest.mark.parametrize("ending", ["an error", "no time left"])
def test_a_step_that_is_saved_without_its_evaluation_is_recorded(tmp_path: Path, ending: str) -> None:
    """A resume begins after the step, so its record would be missing for good; it claims no earlier held-out loss."""
    measured = []

    def evaluate() -> dict[str, float]:
        if measured and ending == "an error":
            raise MemoryError
        if measured:
            os.kill(os.getpid(), signal.SIGTERM)
        while measured:
            time.sleep(0.01)
        measured.append(1.0)
        return {"loss": 1.0}

    with signals_by_default(), nullcontext() if ending == "no time left" else pytest.raises(OutOfMemoryError):
        _fit(tmp_path, task={"evaluate": evaluate}, save_every=0, eval_every=2, grace_s=0.5)
    saved = latest_good(tmp_path / "checkpoints")
    assert (saved.step, saved.state["held_out"]) == (4, None)
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_out_of_memory_before_the_first_step_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the optimizer's state does not fit, the error says what would."""
    monkeypatch.setattr(torch, "zeros_like", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("std::bad_alloc")))
    with pytest.raises(OutOfMemoryError, match=r"preparing the optimizer's state; choose .* \(std::bad_alloc\)"):
        _fit(tmp_path)


def test_what_is_known_of_the_code_is_kept_and_can_stop_the_run(tmp_path: Path) -> None:
    """It is asked before the first step and at each checkpoint, which keeps it; its alarm loses nothing learned."""
    answers: list[int] = []

    def inspect() -> dict[str, Any]:
        if len(answers) == 2:
            raise TrainingHalted("the code got worse")
        answers.append(len(answers))
        return {"asked": len(answers)}

    module = Toy()
    with pytest.raises(TrainingHalted, match="the code got worse"):
        fit(toy_task(module), toy_settings(max_steps=9, save_every=2), Run(tmp_path, {}, inspect_code=inspect))
    first, second = (path / "state.json" for path in list_checkpoints(tmp_path / "checkpoints").values())
    assert json.loads(first.read_text())["code"] == {"asked": 2}
    assert json.loads((first.parent / "manifest.json").read_text())["code"] == {"asked": 2}
    assert json.loads(second.read_text())["counters"]["step"] == 4


def test_a_step_that_is_not_over_in_time_is_given_up(tmp_path: Path) -> None:
    """With `grace_s` the step before is saved although this one never ends, and the run says how it ended."""
    module = Toy()

    def never_end() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            time.sleep(0.01)

    stuck = _at_loss(module, 5, never_end)
    with signals_by_default():
        outcome = _fit(tmp_path, module, task={"loss": stuck}, save_every=0, grace_s=0.5)
    assert (outcome.reason, outcome.step) == ("signal", 4)
    assert latest_good(tmp_path / "checkpoints").step == 4
    assert (5, "step_given_up") in _events(tmp_path)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_step_that_is_over_in_time_is_kept(tmp_path: Path) -> None:
    """A long grace changes nothing: the step is finished and saved."""
    module = Toy()
    asking = _at_loss(module, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))

    with signals_by_default():
        outcome = _fit(tmp_path, module, task={"loss": asking}, save_every=0, grace_s=600)
    assert (outcome.reason, outcome.step) == ("signal", 5)
    assert latest_good(tmp_path / "checkpoints").step == 5


def test_a_folder_that_is_moved_under_the_run_is_named(tmp_path: Path) -> None:
    """The next save says so, no second folder appears, and what was saved is where the folder went."""
    module = Toy()

    def move() -> None:
        while not (tmp_path / "run" / "checkpoints" / "step-00000003").exists():  # another thread writes it
            time.sleep(0.01)
        (tmp_path / "run").rename(tmp_path / "elsewhere")

    moving = _at_loss(module, 5, move)
    (tmp_path / "run").mkdir()
    with pytest.raises(MachineError, match="was moved, renamed or deleted while the run was training"):
        _fit(tmp_path / "run", module, task={"loss": moving}, save_every=3)
    assert not (tmp_path / "run").exists()
    assert latest_good(tmp_path / "elsewhere" / "checkpoints").step == 3
