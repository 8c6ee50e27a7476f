"""The policies of alarms: what was skipped, lowered, taken back or stopped is just that, and a kill changes nothing."""

import math
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from train_toy import Position, Toy, ToyBatch, held_out, toy_batches, toy_loss, toy_settings, toy_task

from entrenar.errors import NonFiniteError, TrainingHalted
from entrenar.runs import list_checkpoints, read_records
from entrenar.train import MonitorConfig, Outcome, Run, fit, latest_good, seed_all

MARK = 7.0
SPIKES = {"monitor_window": 8, "spike_z": 30.0}


class _Killed(BaseException):
    """Ends a run as a kill does: nothing is saved on the way out."""


def _marked(start: dict[str, Any] | None, corrupt: tuple[int, ...]) -> Iterator[tuple[ToyBatch, Position]]:
    """Yield the toy batches; those after which the position is in `corrupt` carry a mark."""
    for batch, position in toy_batches(start):
        if position.index in corrupt:
            batch.x[0, 0] = MARK
        yield batch, position


def _loss(module: Toy, factor: float) -> Callable[[ToyBatch], Tensor]:
    """Return the toy loss; a marked batch has `factor` times its loss."""
    loss = toy_loss(module)
    return lambda batch: loss(batch) * (factor if batch.x[0, 0] == MARK else 1.0)


def _train(
    folder: Path,
    corrupt: tuple[int, ...] = (),
    *,
    factor: float = 1e4,
    start: int | None = None,
    on_record: Callable[[Any], None] = lambda _: None,
    **settings: Any,
) -> tuple[Toy, Outcome]:
    """Train the toy, from its latest checkpoint if there is one; `start` is a position to take instead of its own."""
    seed_all(5)
    module = Toy(dropout=0.2)
    resumed = latest_good(folder / "checkpoints") if list_checkpoints(folder / "checkpoints") else None
    position = {"index": start} if start is not None else resumed.loader_state if resumed else None
    task = toy_task(
        module, batches=_marked(position, corrupt), loss=_loss(module, factor), evaluate=held_out(module)
    )  # fmt: skip
    known = {"max_steps": 20, "save_every": 4, "keep_last": 9} | SPIKES | settings
    outcome = fit(task, toy_settings(**known), Run(folder, {}, resumed), on_record=on_record)
    return module, outcome


def _same(one: Toy, other: Toy) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def _events(folder: Path) -> list[tuple[int, str]]:
    return [(event["step"], event["kind"]) for event in read_records(folder / "events.jsonl")]


def _steps(folder: Path) -> list[int]:
    return [record["step"] for record in read_records(folder / "metrics.jsonl")]


def _kill_at(step: int) -> Callable[[Any], None]:
    def kill(record: Any) -> None:
        if record.step == step:
            raise _Killed

    return kill


@pytest.mark.parametrize(("cord", "factor"), [("loss_spike", 1e4), ("non_finite", math.nan)])
def test_a_rewound_run_is_one_that_never_saw_the_batches_since(tmp_path, cord, factor):
    """After a bad batch at step 11 the run is the one that goes on from step 8 with the batch after the bad one."""
    module, outcome = _train(tmp_path / "rewound", (11,), factor=factor, rewind_on=(cord,))
    with pytest.raises(_Killed):
        _train(tmp_path / "clean", on_record=_kill_at(9))
    clean, _ = _train(tmp_path / "clean", start=11)
    assert outcome.step == 20
    assert _same(module, clean)
    assert _steps(tmp_path / "rewound") == list(range(1, 21))
    events = _events(tmp_path / "rewound")
    assert [event for event in events if event[1] in (cord, "rewound")] == [(11, cord), (8, "rewound")]
    (rewound,) = [each for each in read_records(tmp_path / "rewound" / "events.jsonl") if each["kind"] == "rewound"]
    assert rewound["message"] == (
        f"back to step 8, because of {cord} at step 11; the batches since are left out: "
        "from {'index': 8} to {'index': 11}"
    )
    counters = latest_good(tmp_path / "rewound" / "checkpoints").state["counters"]
    assert (counters["rewinds"], counters["micro_batches"]) == (1, 23)


@pytest.mark.parametrize("killed_at", [9, 11, 13])
def test_a_run_that_is_killed_around_a_rewind_ends_with_the_same_bytes(tmp_path, killed_at):
    """Killed just after the rewind, later, or after the next checkpoint: the resumed run goes the same way."""
    whole, _ = _train(tmp_path / "whole", (11,), rewind_on=("loss_spike",))
    seen: list[int] = []

    def kill(record: Any) -> None:
        seen.append(record.step)
        if seen.count(killed_at) == (2 if killed_at <= 10 else 1):
            raise _Killed

    with pytest.raises(_Killed):
        _train(tmp_path / "killed", (11,), rewind_on=("loss_spike",), on_record=kill)
    resumed, _ = _train(tmp_path / "killed", (11,), rewind_on=("loss_spike",))
    assert _same(whole, resumed)
    assert _steps(tmp_path / "killed") == list(range(1, 21))
    whole_state, state = (latest_good(tmp_path / name / "checkpoints").state for name in ("whole", "killed"))
    for key in ("loader", "rng", "rows"):
        assert state[key] == whole_state[key]
    assert state["counters"]["rewinds"] == 1


def test_a_checkpoint_that_no_step_was_taken_from_is_not_gone_back_to(tmp_path):
    """The alarm comes at the first step after a checkpoint, which may be what a diverging step left: the one before."""
    _train(tmp_path, (9,), rewind_on=("loss_spike",), max_steps=16)
    assert (4, "rewound") in _events(tmp_path)
    assert (4, "checkpoint_abandoned") in _events(tmp_path)
    assert (tmp_path / "checkpoints" / "abandoned-step-00000008").is_dir()
    assert latest_good(tmp_path / "checkpoints").step == 16


def test_a_run_is_rewound_so_often_and_then_stops(tmp_path):
    """Bad data without end: two rewinds, then the third alarm stops the run, with the last good checkpoint there."""
    corrupt = tuple(range(11, 40))
    with pytest.raises(TrainingHalted, match=r"loss_spike: .*, and the run was rewound 2 times before; to continue"):
        _train(tmp_path, corrupt, rewind_on=("loss_spike",), max_rewinds=2)
    assert [kind for _, kind in _events(tmp_path)].count("rewound") == 2
    assert latest_good(tmp_path / "checkpoints").step == 8


def test_there_may_be_nothing_to_go_back_to(tmp_path):
    """Before the first checkpoint an alarm stops the run and says why."""
    with pytest.raises(NonFiniteError, match=r"non_finite: .*, and there is nothing to go back to \(no whole check"):
        _train(tmp_path, (2,), factor=math.nan, rewind_on=("non_finite",))


def test_damage_found_while_rewinding_is_told_and_stepped_over(tmp_path):
    """If the newest good checkpoint is damaged by then, the one before it is taken."""

    def damage(record: Any) -> None:
        if record.step == 10:
            path = tmp_path / "checkpoints" / "step-00000008" / "optimizer.safetensors"
            while not path.exists():  # another thread writes it
                time.sleep(0.01)
            path.write_bytes(path.read_bytes()[:-1])

    _, outcome = _train(tmp_path, (11,), rewind_on=("loss_spike",), on_record=damage)
    assert outcome.step == 20
    assert {(4, "rewound"), (4, "checkpoint_damaged")} <= set(_events(tmp_path))


def test_an_alarm_may_skip_its_step(tmp_path):
    """The step of the alarm counts and moves no weight; the next ones do."""
    trace: list[Tensor] = []
    seed_all(5)
    module = Toy()
    task = toy_task(module, batches=_marked(None, (11,)), loss=_loss(module, 1e4))
    fit(
        task, toy_settings(max_steps=13, save_every=0, skip_on=("loss_spike", "gradient_spike"), **SPIKES),
        Run(tmp_path, {}), on_record=lambda _: trace.append(module.up.weight.detach().clone()),
    )  # fmt: skip
    assert [torch.equal(a, b) for a, b in pairwise(trace[8:])] == [False, True, False, False]


def test_an_alarm_may_lower_the_rate_of_the_later_steps(tmp_path):
    """The rate is half of the schedule's from the step after the alarm on, also in a resumed run."""
    plain: dict[int, float] = {}
    lowered: dict[int, float] = {}
    _train(tmp_path / "plain", on_record=lambda record: plain.update({record.step: record.lr}))
    settings: dict[str, Any] = {"lower_lr_on": ("loss_spike",), "lower_lr_by": 0.5}
    _train(
        tmp_path / "lowered", (11,), on_record=lambda record: lowered.update({record.step: record.lr}), **settings
    )  # fmt: skip
    assert {step: lowered[step] / plain[step] for step in lowered} == pytest.approx(
        {step: 1.0 if step <= 11 else 0.5 for step in range(1, 21)}
    )
    assert (11, "rate_lowered") in _events(tmp_path / "lowered")
    _train(tmp_path / "lowered", (11,), max_steps=22, **settings)
    assert latest_good(tmp_path / "lowered" / "checkpoints").state["counters"]["lr_factor"] == 0.5


def test_a_rise_of_the_held_out_loss_is_an_alarm(tmp_path):
    """A rate that wrecks the model is seen at the next evaluation, and taken back to the checkpoint before."""
    with pytest.raises(TrainingHalted, match=r"held_out_rise: held-out loss .* after a best of"):
        _train(tmp_path, lr=30.0, warmup_steps=0, halt_on=("held_out_rise",), eval_every=1, max_steps=50)
    assert "held_out_rise" in [kind for _, kind in _events(tmp_path)]


@pytest.mark.parametrize(
    ("policies", "named"),
    [
        ({"halt_on": ("loss_spike",), "rewind_on": ("loss_spike",)}, "loss_spike is in halt_on and in rewind_on"),
        ({"skip_on": ("dead_gradient",), "halt_on": ("dead_gradient",)}, "in halt_on and in skip_on"),
        ({"skip_on": ("plateau",)}, "skip_on"),
        ({"rewind_on": ("throughput_drop",)}, "rewind_on"),
        ({"lower_lr_by": 1.0}, "lower_lr_by"),
        ({"max_rewinds": 0}, "max_rewinds"),
    ],
)
def test_policies_that_cannot_be_are_refused(policies, named):
    """An alarm has one policy, and only one that can still be carried out when the alarm comes."""
    with pytest.raises(ValidationError, match=named):
        MonitorConfig(**policies)


def test_a_rate_that_was_lowered_after_a_step_is_in_that_step_s_checkpoint(tmp_path):
    """An alarm of the step that is saved: the resumed run has the same rates as the one that was never stopped."""
    settings = {"lower_lr_on": ("plateau",), "plateau_steps": 16, "plateau_min_drop": 0.99, "save_every": 17}
    rates: dict[int, float] = {}
    _train(tmp_path / "whole", on_record=lambda record: rates.update({record.step: record.lr}), **settings)
    assert (17, "rate_lowered") in _events(tmp_path / "whole")
    with pytest.raises(_Killed):
        _train(tmp_path / "killed", on_record=_kill_at(19), **settings)
    resumed: dict[int, float] = {}
    _train(tmp_path / "killed", on_record=lambda record: resumed.update({record.step: record.lr}), **settings)
    assert resumed == {step: rates[step] for step in (18, 19, 20)}
