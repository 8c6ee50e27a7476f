"""`report.card`: the picture of a run for a notebook holds its figures, and nothing that a run says can act on it."""

import re
from xml.etree import ElementTree

from entrenar.report.card import card, plain
from entrenar.report.follow import News
from entrenar.report.sight import Sight
from entrenar.runs import Event, StepRecord

from .conftest import record

HOSTILE = "<script>alert(1)</script>"


def sight_of(*records, events=(), is_running=True, name="a") -> Sight:
    sight = Sight(name)
    sight.take(News([StepRecord(**one) for one in records], list(events), is_restart=False), is_running=is_running)
    return sight


def test_the_figures_are_those_of_the_run():
    """Step, losses, the share that is done, a line for each kind of loss; well formed."""
    rows = [record(n, eta_s=0.8, held_out={"loss": 2.5} if n in (2, 4) else None) for n in range(1, 5)]
    html = card(sight_of(*rows), "Training")
    ElementTree.fromstring(html)  # noqa: S314  # our own
    assert "<b>a</b> Training" in html
    assert "step 4  loss 2.9600  held-out 2.5000" in html
    assert 'value="0.5000"' in html
    lines = re.findall(r'points="([^"]*)"', html)
    assert lines[0].split() == ["0.0,0.0", "213.3,2.9", "426.7,5.7", "640.0,8.6"]
    assert lines[1].split() == ["213.3,140.0", "640.0,140.0"]
    assert "<progress" not in card(sight_of(*rows, is_running=False))


def test_equal_losses_and_a_long_run_are_drawn():
    """Nothing is divided by nothing, and the points are few."""
    assert "polyline" in card(sight_of(record(1, loss=2.0), record(2, loss=2.0)))
    points = re.findall(r'points="([^"]*)"', card(sight_of(*(record(n) for n in range(1, 3000)))))[0]
    assert len(points.split()) <= 320
    assert "polyline" not in card(sight_of(record(1)))


def test_what_a_run_says_is_escaped():
    """Names, stages and messages are text."""
    html = card(sight_of(record(1), events=[Event(1, HOSTILE, HOSTILE)], name=HOSTILE), HOSTILE)
    assert "<script" not in html
    ElementTree.fromstring(html)  # noqa: S314  # our own


def test_in_text_it_is_one_line():
    """The stage, until there is a step."""
    assert plain(sight_of()) == "a: starting"
    assert plain(sight_of(), "Checking") == "a: Checking"
    assert plain(sight_of(record(1)), "x") == "a: step 1  loss 2.9900  500 tokens/s"
