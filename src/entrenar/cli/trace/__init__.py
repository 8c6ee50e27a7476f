"""`entrenar trace VERB`: one file a verb. Loads no torch."""

import argparse
import importlib
from collections.abc import Sequence

# `run` is the name of the function below, so that its verb lies in command.py.
_FILES = {"run": "command"}
_VERBS = {
    "anomalies": "say which calls, blocks and steps of a trace took far longer than their like",
    "clusters": "group the system calls of a trace by duration and size: its modes and outliers",
    "diff": "say what changed between two traces, beyond noise",
    "map": "say where generated code was written: source maps, notebooks, Cython, torch.compile",
    "export": "write a trace for another viewer: perfetto, speedscope, otlp, flamegraph, pprof",
    "live": "watch a trace in the terminal while it is made",
    "view": "write a trace as one HTML page: timeline, flame graph, system calls",
    "run": "run a command and trace it: system calls with their Python lines, spans, anomalies",
    "report": "say what a trace shows: hot paths, system calls, what to do",
}


def run(words: Sequence[str]) -> int:
    """Run one verb; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="entrenar trace",
        description="See where a program's time goes, from its spans down to the system call and the Python line.",
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(required=True, metavar=" | ".join(_VERBS))
    for name, line in _VERBS.items():
        module = importlib.import_module(f"entrenar.cli.trace.{_FILES.get(name, name)}")
        verb = verbs.add_parser(name, help=line, description=f"{line[0].upper()}{line[1:]}.", allow_abbrev=False)
        module.add(verb)
        verb.set_defaults(verb=module.execute)
    parsed = parser.parse_args(words)
    return int(parsed.verb(parsed))
