"""Draw the pictures of the book's page "What you see" from a run.

    python benchmarks/screenshots.py runs/quickstart     writes docs/watch.svg and docs/report.png

Needs chromium for the second; look at both before they are committed.
"""

import io
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from entrenar.cli.watch_screen import Picture
from entrenar.report import read_history, render
from entrenar.report.follow import Follower
from entrenar.report.sight import Sight
from entrenar.runs import RunFolder

DOCS = Path(__file__).parents[1] / "docs"


def watch(folder: Path) -> None:
    """Draw what `entrenar watch` shows in a terminal of 72 columns when two thirds of the steps are taken."""
    sight, news = Sight(folder.name), Follower(RunFolder(folder)).read()
    steps = news.steps[: len(news.steps) * 2 // 3]
    sight.take(replace(news, steps=steps), is_running=True)
    console = Console(record=True, width=72, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Picture(sight))
    svg = console.export_svg(title=f"entrenar watch {folder.name}", unique_id="watch")
    # The fonts lie on a server; a book that is read offline takes the reader's own.
    (DOCS / "watch.svg").write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), encoding="utf-8")


def report(folder: Path) -> None:
    """Photograph the first screen of the report."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("docs/report.png needs chromium")
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "page.html"
        page.write_text(render([read_history(folder)]), encoding="utf-8")
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--virtual-time-budget=3000", "--window-size=1000,940", f"--user-data-dir={scratch}/profile"]
        subprocess.run([*command, f"--screenshot={DOCS / 'report.png'}", page.as_uri()], check=True)


if __name__ == "__main__":
    watch(Path(sys.argv[1]))
    report(Path(sys.argv[1]))
