"""`report.page`: the page holds the run's figures, and nothing that a run says can act on it."""

import json
import re
import shutil
import subprocess

import pytest

from entrenar.report import read_history, render
from entrenar.report.page import duration

from .conftest import record

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
HOSTILE = "</script><script>document.title='broken'</script>"


def data_of(page: str):
    """Return the figures of a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])


def test_the_page_shows_what_the_metrics_say(make_run):
    """Each series equals the records, a value that is not finite is a gap."""
    rows = [
        record(n, loss=None if n == 3 else 2.5 / n, held_out={"loss": 2.0} if n == 4 else None) for n in range(1, 6)
    ]
    (run,) = data_of(render([read_history(make_run("a", rows))]))
    assert run["step"] == [1, 2, 3, 4, 5]
    assert run["loss"] == [None if row["loss"] is None else pytest.approx(row["loss"]) for row in rows]
    assert (run["eval_step"], run["held_out"]["loss"]) == ([4], [2.0])
    assert run["lr"] == [row["lr"] for row in rows]


@pytest.mark.parametrize(
    ("seconds", "said"), [(4.6, "5 s"), (59.6, "1 min 00 s"), (190, "3 min 10 s"), (7500, "2 h 05 min")]
)
def test_durations_are_said_in_words(seconds, said):
    """The two largest units."""
    assert duration(seconds) == said


def test_nothing_is_fetched(make_run):
    """The page names no other file and no address to load from."""
    page = render([read_history(make_run("a", [record(1)]))])
    assert not re.search(r"""(?:src|href)\s*=|@import|url\(|fetch\(|XMLHttpRequest""", page.replace("xmlns", ""))


def test_what_a_run_says_is_escaped(make_run):
    """Markup in a message or an option is text."""
    events = [{"step": 1, "kind": "spike", "message": HOSTILE}]
    config = f"name = {json.dumps(HOSTILE)}\n"
    page = render([read_history(make_run("a", [record(1)], events, config))])
    assert "<script>document.title" not in page
    assert data_of(page)[0]["events"] == [[1, "spike", HOSTILE]]


def test_a_long_run_is_a_small_page(make_run):
    """100,000 records stay below 3 MB."""
    page = render([read_history(make_run("a", [record(n, loss=2.0 + n % 7) for n in range(1, 100_001)]))])
    assert len(page.encode()) < 3_000_000


def test_no_run_is_an_error():
    """A page about nothing is a mistake of the caller."""
    with pytest.raises(ValueError, match="a report needs at least one run, got none"):
        render([])


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_draws_every_chart_without_an_error(make_run, tmp_path):
    """Loaded from the disk, two runs are drawn into five charts, the title is untouched, the console is silent."""
    events = [{"step": 2, "kind": "spike", "message": HOSTILE}]
    rows = [record(n, held_out={"loss": 2.0, "bits_per_byte": 1.0} if n % 5 == 0 else None) for n in range(1, 50)]
    histories = [read_history(make_run(name, rows, events)) for name in ("a", "b")]
    page = tmp_path / "page.html"
    count = "document.title += ' charts ' + document.querySelectorAll('.chart canvas').length"
    page.write_text(render(histories).replace("</body>", f"<script>{count}</script></body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    command += ["--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.search(r"<title>a, b · entrenar charts 5</title>", done.stdout)
    assert "CONSOLE" not in done.stderr
