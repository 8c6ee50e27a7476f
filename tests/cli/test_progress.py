"""What a person sees while a run goes."""

from dataclasses import replace

import pytest

from entrenar.cli.progress import TrainingView, duration, quantity
from entrenar.runs import StepRecord

RECORD = StepRecord(
    step=1, loss=2.0, lr=0.1, grad_norm=1.0, targets=10, targets_per_s=5.0, elapsed_s=1.0, eta_s=None, epoch=None,
    held_out=None, phases_s={"backward": 0.002},
)  # fmt: skip


def concluded(capsys, epochs: list[float]) -> list[str]:
    """The epochs that are said to have ended while records at these points pass."""
    view = TrainingView(9)
    for epoch in epochs:
        view.record(replace(RECORD, epoch=epoch))
    return [line.split()[2] for line in capsys.readouterr().out.splitlines() if line.startswith("[entrenar: Epoch")]


def test_each_epoch_is_concluded_once(capsys):
    """A line at the first record that reaches an epoch's end; a record past two of them names the later one."""
    assert concluded(capsys, [0.5, 1.0, 1.5, 2.1, 4.2, 4.9]) == ["1/9,", "2/9,", "4/9,"]
    assert concluded(capsys, [1.0, 2.0]) == ["1/9,", "2/9,"]


def test_a_resumed_run_does_not_conclude_earlier_epochs_again(capsys):
    """Resumed in the fourth epoch, the fourth is the first to end."""
    assert concluded(capsys, [3.2, 3.6, 4.0]) == ["4/9,"]


@pytest.mark.parametrize(("seconds", "said"), [(42, "42s"), (190, "3m10s"), (7500, "2h05m")])
def test_durations(seconds, said):
    """As a person would write them."""
    assert duration(seconds) == said


@pytest.mark.parametrize(("count", "said"), [(950, "950"), (12_300, "12.3k"), (4.5e6, "4.5M"), (2e9, "2.0G")])
def test_quantities(count, said):
    """With a unit."""
    assert quantity(count) == said
