"""`entrenar trace report TRACE`: what a trace shows."""

import argparse
import json
from pathlib import Path

from entrenar.cli.trace.output import emit, text_report
from entrenar.trace import findings, report_json
from entrenar.trace.diagnosis import diagnose
from entrenar.trace.hot_paths import profile
from entrenar.trace.locate import trace_file
from entrenar.trace.reader import Reader


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("trace", type=Path, help="a trace file, or the folder of a run")
    parser.add_argument("--function-time", action="store_true", help="the table of hot paths (the default report)")
    parser.add_argument("-c", "--summary", action="store_true", help="the table of system calls, as strace -c")
    parser.add_argument("--stats-extended", action="store_true", help="percentiles of each system call")
    parser.add_argument("--call-graph", action="store_true", help="who called whom")
    parser.add_argument("--format", choices=("text", "json", "csv"), default="text")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the report here")


def execute(parsed: argparse.Namespace) -> int:
    """Report; return 0."""
    with Reader(trace_file(parsed.trace)) as reader:
        summary = profile(reader)
        if parsed.format == "json":
            values = report_json.as_json(reader, summary) | {"diagnosis": findings.as_json(diagnose(reader))}
            text = json.dumps(values, indent=1)
        elif parsed.format == "csv":
            text = "\n".join(report_json.as_csv(reader))
        else:
            text = "\n".join([*text_report(parsed, reader, summary), "", *findings.lines(diagnose(reader))])
    emit(text, parsed.output)
    return 0
