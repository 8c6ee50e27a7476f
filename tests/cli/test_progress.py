"""What a person sees while a run goes."""

import io
from dataclasses import replace

import pytest

from entrenar.cli.progress import TrainingView
from entrenar.data import Progress
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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_never_wraps_on_a_narrow_terminal(monkeypatch):
    """Forty columns: every rewritten line is shorter, and covers the one before."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout", out := Terminal())
    view = TrainingView(None)
    for step, eta_s in ((1, None), (123_456, 7500.0)):
        view.record(replace(RECORD, step=step, eta_s=eta_s, held_out={"loss": 2.5}))
    view._line._shown = float("-inf")
    view.preparing(Progress("tokenizer", 1, 10, 10, 10, 123_456_789, 123_456_789_012))
    written = out.getvalue().split("\r")[1:]
    assert [len(line) for line in written] == [35, 38, 39]
    assert written[0] == "step 1  loss 2.000  held 2.500  5/s"
    assert written[1].rstrip() == "123456  loss 2.000  held 2.500  -2h05m"


@pytest.mark.parametrize(("encoding", "bar"), [("utf-8", "━━━━━━━━━━" + "─" * 20), ("ascii", "==========" + "-" * 20)])
def test_a_wide_terminal_shows_the_share_that_is_done(monkeypatch, encoding, bar):
    """A third of the time is over; without color the bar is told by its characters, also in ASCII."""

    class Encoded(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout", out := Encoded(io.BytesIO(), encoding=encoding))
    view = TrainingView(None)
    view.record(replace(RECORD, elapsed_s=1.0, eta_s=2.0))
    view.record(replace(RECORD, elapsed_s=1.0, eta_s=None, held_out={"loss": 2.5}))
    out.flush()
    first, second = out.buffer.getvalue().decode(encoding).split("\r")[1:]
    assert first == f"{'step 1  loss 2.0000  5 tokens/s  2s left':69}{bar}"
    assert second == "step 1  loss 2.0000  held-out 2.5000  5 tokens/s".ljust(len(first))


def test_color_is_for_terminals_that_want_it(monkeypatch):
    """The part that is done is green."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr("sys.stdout", out := Terminal())
    TrainingView(None).record(replace(RECORD, elapsed_s=1.0, eta_s=2.0))
    assert "\x1b[32m━━━━━━━━━━\x1b[0m" in out.getvalue()
