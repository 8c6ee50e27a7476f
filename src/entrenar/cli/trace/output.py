"""Write the reports requested at the end of a trace, in the requested format."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from entrenar.cli.trace.observers import AnomalyLines
from entrenar.files import atomic_write
from entrenar.trace import anomaly_report, clusters, findings, report_json, report_text
from entrenar.trace.diagnosis import diagnose
from entrenar.trace.hot_paths import Profile, call_graph, profile
from entrenar.trace.reader import Reader
from entrenar.trace.view import page


@contextmanager
def program_output_aside(*, is_needed: bool) -> Iterator[None]:
    """Send the program's standard output to standard error, so that the report has the standard output alone."""
    if not is_needed:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def conclude(parsed: argparse.Namespace, path: Path, observers: Sequence[Any], notes: Sequence[str]) -> None:
    """Report on a trace that was just made, and say where it is."""
    detector = next((one.detector for one in observers if isinstance(one, AnomalyLines)), None)
    with Reader(path) as reader:
        summary = profile(reader)
        analysis = _clusters(parsed, reader)
        if parsed.format == "text":
            text = "\n".join([*text_report(parsed, reader, summary), "", *findings.lines(diagnose(reader))])
            if detector is not None:
                text += "\n\n" + anomaly_report.report(detector)
            if analysis is not None:
                text += "\n\n" + clusters.report(analysis)
            text += "\n\n" + "\n".join(findings.lines(diagnose(reader)))
        elif parsed.format == "json":
            values = report_json.as_json(reader, summary) | (analysis or {})
            values["diagnosis"] = findings.as_json(diagnose(reader))
            if detector is not None:
                values["anomalies"] = anomaly_report.as_json(detector)
            text = json.dumps(values, indent=1)
        elif parsed.format == "html":
            text = page(reader, findings.lines(diagnose(reader)))
        else:
            text = "\n".join(report_json.as_csv(reader))
    emit(text, parsed.output, to_error=parsed.format == "text")
    for note in notes:
        print(f"[entrenar trace: {note}]", file=sys.stderr)
    print(f"[entrenar trace: {path}; see it with: entrenar trace report {path}]", file=sys.stderr)


def emit(text: str, output: Path | None, *, to_error: bool = False) -> None:
    """Write a report to a file, or to the stream that is its place."""
    if output is not None:
        atomic_write(output, text + "\n")
    else:
        print(text, file=sys.stderr if to_error else sys.stdout)


def text_report(parsed: argparse.Namespace, reader: Reader, summary: Profile) -> Iterator[str]:
    """Yield the tables that were asked for; hot paths if none was."""
    is_default = not (parsed.summary or parsed.stats_extended or parsed.call_graph)
    if parsed.function_time or is_default:
        yield from report_text.hot_paths(summary, with_source=True)
    if parsed.summary:
        yield from ("", *report_text.call_table(summary.statistics))
    if parsed.stats_extended:
        yield from ("", *report_text.percentile_table(summary.statistics, reader.info().floor_ns))
    if parsed.call_graph:
        yield from ("", *report_text.graph_table(call_graph(reader.tallies())))


def _clusters(parsed: argparse.Namespace, reader: Reader) -> dict[str, Any] | None:
    if not parsed.ml_anomaly:
        return None
    found = clusters.cluster(clusters.timed_calls(reader.calls()), parsed.ml_clusters)
    return clusters.as_json(found, compare=parsed.ml_compare)
