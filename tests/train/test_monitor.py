"""The cords are pulled by what they are for, by nothing else, and their windows survive a checkpoint."""

import json
import math
import random

import pytest
from pydantic import ValidationError

from entrenar.runs import Event
from entrenar.train.monitor import Monitor, MonitorConfig


def _run(monitor: Monitor, losses: list[float], norms: list[float] | None = None, rate: float = 100.0) -> list[Event]:
    events = []
    for step, loss in enumerate(losses, start=1):
        events += monitor.before_update(step, loss, norms[step - 1] if norms else 1.0)
        events += monitor.after_step(step, loss, rate)
    return events


def _healthy(steps: int) -> list[float]:
    chance = random.Random(1)
    return [2.0 + 3.0 / (1 + step / 50) + chance.gauss(0, 0.05) for step in range(steps)]


def test_a_healthy_run_pulls_no_cord() -> None:
    """A falling, noisy loss leaves no event in 3,000 steps."""
    chance = random.Random(2)
    norms = [1.0 + 0.1 * chance.random() for _ in range(3000)]
    assert _run(Monitor(MonitorConfig()), _healthy(900), norms) == []


@pytest.mark.parametrize(("kind", "position"), [("loss_spike", 0), ("gradient_spike", 1)])
def test_a_spike_is_seen_at_its_own_step(kind: str, position: int) -> None:
    """One high value after a usual window is told with its size, and the step after it is usual again."""
    losses, norms = _healthy(100), [1.0 + step % 3 / 10 for step in range(100)]
    (losses if position == 0 else norms)[80] = 50.0
    events = _run(Monitor(MonitorConfig()), losses, norms)
    assert [(event.step, event.kind) for event in events] == [(81, kind)]
    assert "50 is" in events[0].message
    assert "deviations above its usual" in events[0].message


def test_nothing_is_judged_before_half_a_window() -> None:
    """A spike among the first values is no spike yet; one right after half the window is."""
    config = MonitorConfig(monitor_window=8)
    assert _run(Monitor(config), [1.0, 1.1, 0.9, 50.0]) == []
    assert [event.step for event in _run(Monitor(config), [1.0, 1.1, 0.9, 1.0, 50.0])] == [5]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_non_finite_values_are_told_and_kept_out_of_the_windows(loss: float, norm: float) -> None:
    """NaN and infinity in either value are an event that says so, stop the run, and are not remembered."""
    monitor = Monitor(MonitorConfig())
    (event,) = monitor.before_update(3, loss, norm)
    assert event == Event(3, "non_finite", f"loss is {loss}, gradient norm is {norm}; no parameter was moved")
    assert monitor.action(event) == "halt"
    assert monitor.state_dict()["windows"]["loss"] == []


def test_up_to_n_non_finite_steps_in_a_row_may_be_skipped() -> None:
    """With two allowed, the third in a row halts; a finite one between starts the count again."""
    monitor = Monitor(MonitorConfig(max_skipped_steps=2))
    losses = (math.nan, math.nan, 1.0, math.nan, math.nan, math.nan)
    halted = [[monitor.action(event) == "halt" for event in monitor.before_update(1, loss, 1.0)] for loss in losses]
    assert halted == [[False], [False], [], [False], [False], [True]]


def test_a_dead_gradient_is_told_once() -> None:
    """Five steps without gradient are told at the fifth, and again only after life has returned."""
    norms = [1.0, 0.0, 0.0, 1.0] + [0.0] * 8 + [1.0] + [1e-9] * 5
    events = _run(Monitor(MonitorConfig()), [1.0] * len(norms), norms)
    assert [(event.step, event.kind) for event in events] == [(9, "dead_gradient"), (18, "dead_gradient")]
    assert events[0].message == "gradient norm at most 1e-08 for 5 steps"


def test_a_plateau_is_told_once_a_window() -> None:
    """A loss that no longer falls is told after each full window; one that falls is not."""
    config = MonitorConfig(plateau_steps=20)
    flat = [1.0 + 0.01 * (-1) ** step for step in range(61)]
    assert [(event.step, event.kind) for event in _run(Monitor(config), flat)] == [
        (21, "plateau"),
        (41, "plateau"),
        (61, "plateau"),
    ]
    assert _run(Monitor(config), [2.0 * 0.99**step for step in range(61)]) == []


def test_a_drop_of_throughput_is_told() -> None:
    """Less than half the usual speed for three steps is told once; a little less, and two slow steps, are not."""
    monitor = Monitor(MonitorConfig(monitor_window=16, throughput_drop_steps=3))
    rates = [100.0] * 16 + [60.0] * 3 + [40.0] * 2 + [100.0] * 3 + [40.0] * 4
    events = [event for step, rate in enumerate(rates, start=1) for event in monitor.after_step(step, 1.0, rate)]
    assert events == [Event(27, "throughput_drop", "40.0 targets/s, usually 100.0, for 3 steps")]


def test_only_the_chosen_cords_halt() -> None:
    """An event stops the run only if its kind is in `halt_on`."""
    monitor = Monitor(MonitorConfig(halt_on=("plateau",)))
    assert monitor.action(Event(1, "plateau", "")) == "halt"
    assert monitor.action(Event(1, "loss_spike", "")) == "warn"


def test_an_unknown_cord_is_refused() -> None:
    """A cord that does not exist cannot be chosen."""
    with pytest.raises(ValidationError, match="halt_on"):
        MonitorConfig(halt_on=("spike",))


def test_windows_survive_a_checkpoint() -> None:
    """A monitor that is saved as JSON and restored tells exactly what one that was never stopped tells."""
    config = MonitorConfig(monitor_window=16, plateau_steps=64, max_skipped_steps=9)
    losses = [*_healthy(40), 50.0, math.nan, *_healthy(60)]
    norms = [0.0 if 38 <= step < 44 else 1.0 for step in range(len(losses))]
    whole = Monitor(config)
    expected = _run(whole, losses, norms)
    assert {event.kind for event in expected} >= {"loss_spike", "non_finite", "dead_gradient"}
    for cut in (5, 39, 40, 41, 42):
        first = Monitor(config)
        events = _run(first, losses[:cut], norms[:cut])
        second = Monitor(config)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        events += [
            Event(event.step + cut, event.kind, event.message) for event in _run(second, losses[cut:], norms[cut:])
        ]
        assert events == expected
        assert repr(second.state_dict()) == repr(whole.state_dict())


def test_a_dead_layer_is_told_by_name() -> None:
    """Layers without gradient are named once, at the fifth step; all of them dead is the other message."""
    monitor = Monitor(MonitorConfig())
    dead = {"model.layers.0": 0.0, "model.layers.1": 1e-9, "model.norm.weight": 1.0}
    events = [event for step in range(1, 9) for event in monitor.before_update(step, 1.0, 1.0, dead)]
    assert events == [
        Event(5, "dead_gradient", "model.layers.0 and 1 more: gradient norm at most 1e-08 for 5 steps"),
    ]
    restored = Monitor(MonitorConfig())
    restored.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert restored.before_update(9, 1.0, 1.0, dead) == []
    assert monitor.before_update(9, 1.0, 1.0, dict.fromkeys(dead, 1.0)) == []
    all_dead = [event for step in range(10, 16) for event in monitor.before_update(step, 1.0, 0.0, {"a": 0.0})]
    assert [event.message for event in all_dead] == ["gradient norm at most 1e-08 for 5 steps"]


def test_a_rise_of_the_held_out_loss_is_told_once() -> None:
    """A tenth above the best is told; again only after it has come down. NaN is a rise; no best, no judgment."""
    monitor = Monitor(MonitorConfig())
    rising = [
        bool(monitor.after_evaluation(step, loss, best))
        for step, (loss, best) in enumerate([(9.0, None), (2.0, 9.0), (2.19, 2.0), (2.21, 2.0), (3.0, 2.0), (2.0, 2.0)])
    ]
    assert rising == [False, False, False, True, False, False]
    assert monitor.after_evaluation(7, math.nan, 2.0) == [
        Event(7, "held_out_rise", "held-out loss nan after a best of 2.0000")
    ]
    restored = Monitor(MonitorConfig())
    restored.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    assert restored.after_evaluation(8, math.nan, 2.0) == []
