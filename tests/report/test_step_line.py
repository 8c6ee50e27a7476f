"""`report.step_line`: a step fits the terminal, and nothing that a run says can move the cursor."""

from dataclasses import replace

import pytest

from entrenar.report.step_line import duration, event_line, quantity, step_line
from entrenar.runs import Event, StepRecord

RECORD = StepRecord(
    step=123_456, loss=2.34567, lr=0.1, grad_norm=1.0, targets=10, targets_per_s=12_345.0, elapsed_s=1.0, eta_s=7500.0,
    epoch=None, held_out=None, phases_s={},
)  # fmt: skip
HELD_OUT = {"loss": 2.5}


@pytest.mark.parametrize(("seconds", "said"), [(42, "42s"), (190, "3m10s"), (7500, "2h05m")])
def test_durations(seconds, said):
    """As a person would write them."""
    assert duration(seconds) == said


@pytest.mark.parametrize(("count", "said"), [(950, "950"), (12_300, "12.3k"), (4.5e6, "4.5M"), (2e9, "2.0G")])
def test_quantities(count, said):
    """With a unit."""
    assert quantity(count) == said


@pytest.mark.parametrize(
    ("width", "said"),
    [
        (None, "step 123456  loss 2.3457  held-out 2.5000  12.3k tokens/s  2h05m left"),
        (69, "step 123456  loss 2.3457  held-out 2.5000  12.3k tokens/s  2h05m left"),
        (68, "step 123456  loss 2.346  held 2.500  12.3k/s  2h05m left"),
        (50, "123456  loss 2.346  held 2.500  12.3k/s  -2h05m"),
        (40, "123456  loss 2.346  held 2.500  -2h05m"),
        (30, "123456  loss 2.346  -2h05m"),
        (10, "123456  lo"),
    ],
)
def test_a_step_fits_the_width(width, said):
    """What matters least goes first; 40 columns keep step, both losses and the time left."""
    assert step_line(RECORD, HELD_OUT, width) == said


def test_what_is_not_known_is_left_out():
    """No estimate and no evaluation."""
    line = step_line(replace(RECORD, eta_s=None), None, None)
    assert line == "step 123456  loss 2.3457  12.3k tokens/s"


def test_an_event_is_one_line_without_control_characters():
    """A message from a run's file cannot clear the screen."""
    assert event_line(Event(3, "loss_spike", "a\x1b[2J\nb\tc")) == "step 3: loss spike: a [2J b c"
