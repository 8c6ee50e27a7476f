"""`entrenar report RUN [RUN…]`: one self-contained HTML page about a run, or several compared."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from entrenar.files import atomic_write
from entrenar.report import read_history, render
from entrenar.report.overview import find_run
from entrenar.runs import RunFolder


def run(words: Sequence[str]) -> int:
    """Write the page; return the exit code."""
    arguments = argparse.ArgumentParser(
        prog="entrenar report",
        description="Write one HTML page, without any network, about a run or several runs compared.",
        epilog="example: entrenar report quickstart",
        allow_abbrev=False,
    )
    arguments.add_argument("runs", nargs="+", metavar="RUN", help="name in the folder of runs, or a path")
    arguments.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
    arguments.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first run's folder")
    parsed = arguments.parse_args(words)
    folders = [find_run(parsed.runs_dir, name) for name in parsed.runs]
    out: Path = parsed.out or RunFolder(folders[0]).report
    page = render([read_history(folder) for folder in folders])
    atomic_write(out, page)
    print(f"{out}  ({len(page.encode()) / 1e6:.1f} MB); open it in a browser")
    return 0
