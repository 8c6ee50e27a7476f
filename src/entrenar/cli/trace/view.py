"""`entrenar trace view TRACE`: a trace as one HTML page."""

import argparse
import webbrowser
from pathlib import Path

from entrenar.files import atomic_write
from entrenar.trace import findings
from entrenar.trace.diagnosis import diagnose
from entrenar.trace.locate import trace_file
from entrenar.trace.reader import Reader
from entrenar.trace.view import page


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("trace", type=Path, help="a trace file, or the folder of a run")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to (beside the trace)")
    parser.add_argument("--open", action="store_true", help="open it in a browser")


def execute(parsed: argparse.Namespace) -> int:
    """Write the page; return 0."""
    path = trace_file(parsed.trace)
    output = parsed.output or path.with_suffix(".html")
    with Reader(path) as reader:
        atomic_write(output, page(reader, findings.lines(diagnose(reader))))
    print(output)
    if parsed.open:
        webbrowser.open(output.resolve().as_uri())
    return 0
