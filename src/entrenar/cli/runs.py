"""`entrenar runs list|show|compare|rm`: the runs there are, how each ended, what differs."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from entrenar.errors import ConfigError
from entrenar.report import findings, read_history
from entrenar.report.history import differences
from entrenar.report.overview import Overview, describe, find_run, list_runs, remove
from entrenar.report.page import duration

_COLUMNS = ("run", "kind", "begun", "steps", "time", "loss", "best held-out", "how it ended")


def run(words: Sequence[str]) -> int:
    """Run the action in the first word; return the exit code."""
    parsed = _arguments().parse_args(words or ["list"])
    if parsed.action == "list":
        return _list(parsed)
    folders = [find_run(parsed.runs_dir, name) for name in parsed.names]
    return {"show": _show, "compare": _compare, "rm": _remove}[parsed.action](folders, parsed)


def _arguments() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="entrenar runs",
        description="See the runs there are, when each began, how it ended, and what differs.",
        epilog="example: entrenar runs compare quickstart second",
        allow_abbrev=False,
    )
    actions = arguments.add_subparsers(dest="action", required=True, metavar="list|show|compare|rm")
    texts = {
        "list": "all runs, the newest last", "show": "one run: figures, findings, checkpoints",
        "compare": "several runs: figures and the settings that differ", "rm": "delete runs that are not in use",
    }  # fmt: skip
    for action, text in texts.items():
        one = actions.add_parser(action, help=text, description=text, allow_abbrev=False)
        one.add_argument("--runs-dir", type=Path, default=Path("runs"), metavar="DIR", help="default: runs")
        if action != "list":
            one.add_argument("names", nargs="+", metavar="RUN", help="name in the folder of runs, or a path")
        if action == "rm":
            one.add_argument("--yes", action="store_true", help="do not ask")
        else:
            one.add_argument("--json", action="store_true", help="print JSON")
    return arguments


def _list(parsed: argparse.Namespace) -> int:
    overviews = list_runs(parsed.runs_dir)
    if parsed.json:
        print(json.dumps([asdict(one) for one in overviews], indent=2))
    elif overviews:
        _print_table(overviews)
        print(f"\nNext: entrenar runs show {overviews[-1].name}")
    else:
        print(f"No runs in {parsed.runs_dir}; `entrenar quickstart` makes the first one.")
    return 0


def _print_table(overviews: Sequence[Overview]) -> None:
    rows = [_COLUMNS, *(_cells(one) for one in overviews)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _cells(one: Overview) -> tuple[str, ...]:
    elapsed = "" if one.elapsed_s is None else duration(one.elapsed_s)
    return (
        one.name, one.kind, one.begun, f"{one.steps:,}", elapsed, _loss(one.loss), _loss(one.best_held_out_loss),
        one.status,
    )  # fmt: skip


def _loss(loss: float | None) -> str:
    return "" if loss is None or not math.isfinite(loss) else f"{loss:.4f}"


def _show(folders: Sequence[Path], parsed: argparse.Namespace) -> int:
    if parsed.json:
        print(json.dumps([asdict(describe(folder)) for folder in folders], indent=2))
        return 0
    for folder in folders:
        one = describe(folder)
        for name, cell in zip(_COLUMNS, _cells(one), strict=True):
            print(f"{name:<14} {cell}".rstrip())
        print(f"{'checkpoint':<14} {'none' if one.checkpoint is None else f'step {one.checkpoint:,}'}")
        if one.steps:
            for found in findings(read_history(folder)):
                print(f"{found.kind:<14} {found.what} ({found.evidence}) {found.advice}".rstrip())
        print(f"\nNext: entrenar report {folder}")
    return 0


def _compare(folders: Sequence[Path], parsed: argparse.Namespace) -> int:
    overviews = [describe(folder) for folder in folders]
    known = [read_history(folder) for folder, one in zip(folders, overviews, strict=True) if one.steps]
    rows = differences(known)
    if parsed.json:
        print(json.dumps({"runs": [asdict(one) for one in overviews], "differences": dict(rows)}, indent=2))
        return 0
    _print_table(overviews)
    print()
    for key, values in rows:
        print(f"{key:<28} {'  |  '.join(value or '(absent)' for value in values)}")
    if not rows:
        print("The settings do not differ.")
    print(f"\nNext: entrenar report {' '.join(map(str, folders))}")
    return 0


def _remove(folders: Sequence[Path], parsed: argparse.Namespace) -> int:
    for folder in folders:
        if not parsed.yes and not _agreed(folder):
            print(f"{folder} stays")
            continue
        remove(folder)
        print(f"{folder} is deleted")
    return 0


def _agreed(folder: Path) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError(f"deleting {folder} needs a yes: give --yes where nobody can be asked")
    return input(f"Delete {folder} with its checkpoints? [y/N] ").strip().lower() in ("y", "yes")
