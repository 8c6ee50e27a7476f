"""`cli.watch_screen`: the picture of a run holds its figures and fits the terminal."""

import io

import pytest
from rich.console import Console

from entrenar.cli.watch_screen import LiveScreen, Picture, loss_line, sparkline
from entrenar.report.follow import News
from entrenar.report.sight import Sight
from entrenar.runs import Event, StepRecord

from ..report.conftest import record


def sight_of(*records, events=(), is_running=True) -> Sight:
    sight = Sight("a")
    sight.take(News([StepRecord(**one) for one in records], list(events), is_restart=False), is_running=is_running)
    return sight


def picture(sight: Sight, width: int, *, encoding: str = "utf-8") -> list[str]:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace")
    Console(file=stream, width=width, color_system=None).print(Picture(sight))
    stream.flush()
    return raw.getvalue().decode(encoding).splitlines()


def test_the_picture_holds_the_figures():
    """Step, times, losses, pace, rate, norm, phases, events."""
    rows = [record(n, eta_s=60.0, held_out={"loss": 2.5 + n} if n < 3 else None) for n in (1, 2, 3)]
    text = "\n".join(picture(sight_of(*rows, events=[Event(2, "loss_spike", "[bold]x[/red]")]), 80))
    for said in (
        "a  runs now", "step 3  1s, 1m00s left", "loss 2.9800  500 tokens/s", "held-out 4.5000  best 3.5000 at step 1",
        "rate 1.0e-03  gradient norm 1", "backward 55%  forward 40%", "step 2: loss spike: [bold]x[/red]",
    ):  # fmt: skip
        assert said in text


@pytest.mark.parametrize("width", [20, 40, 200])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_no_line_is_wider_than_the_terminal(width, encoding):
    """At any width and in a C locale, one step or many; nothing is escaped in ASCII."""
    rows = [record(n, eta_s=60.0, held_out={"loss": 2.5}) for n in range(1, 300)]
    lines = picture(sight_of(*rows, events=[Event(2, "spike", "long " * 50)]), width, encoding=encoding)
    assert max(map(len, lines)) <= width
    assert len(lines) == 9
    assert encoding == "utf-8" or "\\u" not in "".join(lines[:8])


def test_a_run_that_has_no_step_or_does_not_run_says_so():
    """No figures are made up."""
    assert picture(sight_of(is_running=False), 80) == ["a  not running", "no step is recorded yet"]
    assert len(picture(sight_of(record(1, phases_s={})), 80)) == 6


def test_a_sparkline_keeps_the_shape():
    """Lowest and highest are the lowest and highest bar; equal values are low."""
    assert sparkline([], 5, " abc") == ""
    assert sparkline([1.0, 3.0, 2.0], 5, " abc") == "acb"
    assert sparkline([1.0, 1.0, 5.0, 5.0], 2, " abc") == "ac"
    assert sparkline([2.0, 2.0], 5, " abc") == "aa"


def test_losses_are_drawn_on_a_logarithmic_scale():
    """Halving is a step of the same height wherever it happens; a loss of 0 has no logarithm and is left out."""
    assert loss_line([8.0, 4.0, 2.0, 1.0, 0.0], 5, " abcd") == "dcba"


def test_the_screen_is_rewritten_and_left_in_place():
    """Two pictures, one after the other, and the last stays."""
    out = io.StringIO()
    screen = LiveScreen(Console(file=out, width=60, force_terminal=True, color_system=None))
    for step in (1, 2):
        screen.show(sight_of(record(step)))
    screen.close()
    assert "step 1 " in out.getvalue()
    assert out.getvalue().rindex("step 2 ") > out.getvalue().rindex("step 1 ")
