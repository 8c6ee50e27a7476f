"""`entrenar trace clusters TRACE`: the modes of the system calls' durations, and what lies outside of them."""

import argparse
import json
from pathlib import Path
from typing import Any

from entrenar.files import read_json
from entrenar.trace import clusters
from entrenar.trace.locate import trace_file
from entrenar.trace.reader import Reader


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument(
        "trace", type=Path, help="a trace file, the folder of a run, or a profile (.json) that --ml-anomaly wrote"
    )
    parser.add_argument("--ml-clusters", type=int, metavar="N", help="how many clusters (chosen by silhouette)")
    parser.add_argument("--ml-compare", action="store_true", help="compare the clusters with the z-score")
    parser.add_argument("--format", choices=("text", "json"), default="text")


def execute(parsed: argparse.Namespace) -> int:
    """Cluster the calls of a trace, or read the analysis in a profile, and report; return 0."""
    analysis = read_json(parsed.trace) if parsed.trace.suffix == ".json" else _analyzed(parsed)
    text = clusters.report(analysis)
    print(json.dumps(analysis, indent=1) if parsed.format == "json" else text)
    return 0


def _analyzed(parsed: argparse.Namespace) -> dict[str, Any]:
    with Reader(trace_file(parsed.trace)) as reader:
        found = clusters.cluster(clusters.timed_calls(reader.calls()), parsed.ml_clusters)
    return clusters.as_json(found, compare=parsed.ml_compare)
