"""`entrenar trace anomalies TRACE`: what took far longer than its like, in a trace that was recorded."""

import argparse
import heapq
import json
from collections.abc import Iterator
from pathlib import Path

from entrenar.trace.anomaly import METHODS, Detector, Event, Sensitivity, event_of_call, event_of_span
from entrenar.trace.anomaly_report import as_json, line, report
from entrenar.trace.locate import trace_file
from entrenar.trace.reader import Reader


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("trace", type=Path, help="a trace file, or the folder of a run")
    parser.add_argument("--anomaly-threshold", type=float, default=3.0, metavar="SIGMA", help="from how far on (3.0)")
    parser.add_argument("--anomaly-method", choices=METHODS, default=METHODS[0], help="robust, or the classic z-score")
    parser.add_argument("--short", action="store_true", help="lines without the baseline, totals in one line")
    parser.add_argument("--format", choices=("text", "json"), default="text")


def execute(parsed: argparse.Namespace) -> int:
    """Replay a trace through the detector and report; return 0."""
    detector = Detector(Sensitivity(threshold=parsed.anomaly_threshold), method=parsed.anomaly_method)
    with Reader(trace_file(parsed.trace)) as reader:
        found = detector.see_all(_events(reader))
    if parsed.format == "json":
        print(json.dumps(as_json(detector), indent=1))
        return 0
    for anomaly in found:
        print(line(anomaly, short=parsed.short))
    if found:
        print()
    print(report(detector, short=parsed.short))
    return 0


def _events(reader: Reader) -> Iterator[Event]:
    """Yield calls and spans as a detector would have met them, in the order they began."""
    calls = (event for call in reader.calls() if (event := event_of_call(call)) is not None)
    spans = (event for span in reader.spans() if (event := event_of_span(span)) is not None)
    return heapq.merge(calls, spans, key=lambda event: event.at_ns)
