"""`entrenar report RUN [RUN…]`: one self-contained HTML page about a run, or several compared."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from entrenar.files import atomic_write
from entrenar.report import read_history, render
from entrenar.runs import RunFolder


def run(words: Sequence[str]) -> int:
    """Write the page; return the exit code."""
    arguments = argparse.ArgumentParser(
        prog="entrenar report",
        description="Write one HTML page, without any network, about a run or several runs compared.",
        epilog="example: entrenar report runs/quickstart",
        allow_abbrev=False,
    )
    arguments.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, such as runs/quickstart")
    arguments.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first run's folder")
    parsed = arguments.parse_args(words)
    out: Path = parsed.out or RunFolder(parsed.runs[0]).report
    page = render([read_history(path) for path in parsed.runs])
    atomic_write(out, page)
    print(f"{out}  ({len(page.encode()) / 1e6:.1f} MB); open it in a browser")
    return 0
