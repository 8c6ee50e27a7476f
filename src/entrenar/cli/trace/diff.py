"""`entrenar trace diff BEFORE AFTER`: what changed between two runs, beyond noise."""

import argparse
import json
from pathlib import Path

from entrenar.trace.compare import as_json, compare, lines
from entrenar.trace.locate import trace_file
from entrenar.trace.reader import Reader


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("before", type=Path, help="a trace file, or the folder of a run")
    parser.add_argument("after", type=Path, help="the same of a later run")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="how many changes are told (20)")
    parser.add_argument("--format", choices=("text", "json"), default="text")


def execute(parsed: argparse.Namespace) -> int:
    """Compare and report; return 0."""
    with Reader(trace_file(parsed.before)) as before, Reader(trace_file(parsed.after)) as after:
        comparison = compare(before, after)
    if parsed.format == "json":
        print(json.dumps(as_json(comparison), indent=1))
    else:
        print("\n".join(lines(comparison, top=parsed.top)))
    return 0
