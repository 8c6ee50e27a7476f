"""`entrenar trace export TRACE --to FORM`: write a trace for another viewer."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from entrenar.files import atomic_write
from entrenar.trace.export import otlp, perfetto, stacks
from entrenar.trace.locate import trace_file
from entrenar.trace.reader import Reader

_SUFFIX = {
    "perfetto": ".perfetto.json", "speedscope": ".speedscope.json", "otlp": ".otlp.json", "flamegraph": ".folded",
    "pprof": ".pb.gz",
}  # fmt: skip
_OPEN_WITH = {
    "perfetto": "https://ui.perfetto.dev",
    "speedscope": "https://www.speedscope.app",
    "otlp": "an OpenTelemetry collector: POST it to /v1/traces as application/json",
    "flamegraph": "flamegraph.pl, inferno or speedscope",
    "pprof": "go tool pprof -http=:8080",
}


def add(parser: argparse.ArgumentParser) -> None:
    """Add the flags."""
    parser.add_argument("trace", type=Path, help="a trace file, or the folder of a run")
    parser.add_argument("--to", choices=tuple(_SUFFIX), required=True, metavar="FORM", help=", ".join(_SUFFIX))
    parser.add_argument("--service-name", default="entrenar", metavar="NAME", help="of OTLP (entrenar)")
    parser.add_argument("--stretch", type=int, default=otlp.STRETCH, metavar="N", help="steps to a trace of OTLP (100)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where to (beside the trace)")


def execute(parsed: argparse.Namespace) -> int:
    """Export; return 0."""
    path = trace_file(parsed.trace)
    output = parsed.output or path.with_suffix(_SUFFIX[parsed.to])
    with Reader(path) as reader:
        atomic_write(output, _content(reader, parsed))
    print(f"{output}   open it with {_OPEN_WITH[parsed.to]}")
    return 0


def _content(reader: Reader, parsed: argparse.Namespace) -> bytes:
    if parsed.to == "pprof":
        return stacks.pprof(reader)
    lines: Iterable[str]
    if parsed.to == "perfetto":
        lines = perfetto.perfetto(reader)
    elif parsed.to == "flamegraph":
        lines = stacks.flamegraph(reader)
    elif parsed.to == "speedscope":
        lines = [json.dumps(stacks.speedscope(reader))]
    else:
        spans = otlp.otlp_spans(reader, stretch=parsed.stretch)
        lines = [json.dumps(otlp.otlp_json(spans, parsed.service_name))]
    return "".join(lines).encode()
