"""`report.sight`: what is shown of a run is that of its records, however they came."""

import math

import pytest

from entrenar.report.follow import News
from entrenar.report.sight import Sight
from entrenar.runs import Event, StepRecord

from .conftest import record


def step(number: int, **changes) -> StepRecord:
    return StepRecord(**record(number, **changes))


def test_the_figures_are_those_of_the_records():
    """Mean of the newest losses, best evaluation, phases, and what is quiet is only counted."""
    sight = Sight("a")
    assert math.isnan(sight.mean_loss)
    assert sight.share_done is None
    steps = [
        step(1, loss=2.0, held_out={"loss": 3.0}),
        step(2, loss=4.0, held_out={"loss": 3.5}),
        step(3, loss=math.nan),
    ]
    events = [Event(1, "checkpoint_saved", ""), Event(2, "spike", "x")]
    sight.take(News(steps, events, is_restart=False), is_running=True)
    assert (sight.mean_loss, sight.losses, sight.num_saved) == (3.0, [2.0, 4.0], 1)
    assert sight.held_out == {"loss": 3.5}
    assert sight.best is not None
    assert sight.best.step == 1
    assert sight.held_out_losses == [(0, 3.0), (1, 3.5)]
    assert sight.phases_s["backward"] == pytest.approx(0.33)
    assert [event.kind for event in sight.events] == ["spike"]
    assert sight.share_done is None
    sight.take(News([step(4, eta_s=0.8)], [], is_restart=False), is_running=False)
    assert sight.share_done == pytest.approx(0.5)
    assert (sight.has_new_step, sight.new_events, sight.is_running) == (True, [], False)
    sight.take(News([], [], is_restart=False), is_running=False)
    assert not sight.has_new_step


def test_a_restart_forgets_and_old_events_are_told_in_part():
    """The first look at a long run does not print its whole past."""
    sight = Sight("a")
    steps = [step(number, held_out={"loss": 1.0}) for number in range(1, 9)]
    events = [Event(number, "spike", "") for number in range(1, 9)]
    sight.take(News(steps, events, is_restart=False), is_running=True)
    assert [event.step for event in sight.new_events] == [4, 5, 6, 7, 8]
    assert [one.step for one in sight.new_evaluations] == [4, 5, 6, 7, 8]
    sight.take(News(steps, events, is_restart=False), is_running=True)
    assert len(sight.new_events) == 8
    sight.take(News([step(1)], [], is_restart=True), is_running=True)
    assert (sight.losses, sight.best, list(sight.events)) == ([2.99], None, [])


def test_a_held_out_loss_that_is_not_finite_is_never_the_best():
    """Null in the file, or an evaluation without a loss."""
    sight = Sight("a")
    sight.take(
        News([step(1, held_out={"loss": None}), step(2, held_out={"x": 1.0})], [], is_restart=False), is_running=True
    )
    assert sight.best is None


def test_a_run_of_no_length_has_no_share():
    """Nothing is divided by nothing."""
    sight = Sight("a")
    sight.take(News([step(1, elapsed_s=0.0, eta_s=0.0)], [], is_restart=False), is_running=True)
    assert sight.share_done is None
