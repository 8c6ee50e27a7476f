"""Write Chrome's trace event format for Perfetto, chrome://tracing and VizTracer's viewer.

https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU: "X" events with microseconds, one
track a thread; system calls lie under the span that made them, because they lie inside it on its thread's track.
"""

import json
from collections.abc import Iterator
from typing import Any

from entrenar.trace.hot_paths import responsible
from entrenar.trace.reader import Reader

_NS_PER_US = 1e3


def perfetto(reader: Reader) -> Iterator[str]:
    """Yield the file in pieces, an event each."""
    yield '{"displayTimeUnit":"ms","traceEvents":[\n'
    separator = ""
    for event in _events(reader):
        yield separator + json.dumps(event, separators=(",", ":"), default=str)
        separator = ",\n"
    yield "\n]}\n"


def _events(reader: Reader) -> Iterator[dict[str, Any]]:
    started_ns = reader.info().started_ns
    ended_ns = reader.info().ended_ns or started_ns

    def at(time_ns: int) -> float:
        return (time_ns - started_ns) / _NS_PER_US

    for process in reader.processes():
        rank = "" if process.rank is None else f"rank {process.rank}: "
        title = {"name": f"{rank}{process.command}"}
        yield {"ph": "M", "name": "process_name", "pid": process.pid, "args": title}
    for span in reader.spans():
        end = span.end_ns if span.end_ns is not None else max(ended_ns, span.start_ns)
        arguments = {**span.attributes, "span": f"{span.id:016x}", "status": span.status}
        yield {
            "ph": "X", "cat": "span", "name": span.name, "pid": span.pid, "tid": span.tid, "ts": at(span.start_ns),
            "dur": (end - span.start_ns) / _NS_PER_US, "args": arguments,
        }  # fmt: skip
    for call in reader.calls():
        frame = responsible(call.stack) if call.stack else None
        source = frame and f"{frame.file}:{frame.line} in {frame.function}"
        yield {
            "ph": "X", "cat": "syscall", "name": call.name, "pid": call.pid, "tid": call.tid, "ts": at(call.start_ns),
            "dur": (call.duration_ns or 0) / _NS_PER_US,
            "args": {"result": call.result, "error": call.error, "path": call.path, "bytes": call.size_bytes,
                     "source": source},
        }  # fmt: skip
    first = reader.processes()[0].pid if reader.processes() else 0
    for metric in reader.metrics():
        yield {"ph": "C", "name": metric.name, "pid": first, "ts": at(metric.at_ns), "args": {"value": metric.value}}
    for anomaly in reader.anomalies():
        name = f"{anomaly.severity}: {anomaly.operation}"
        yield {
            "ph": "i", "s": "t", "cat": "anomaly", "name": name, "pid": anomaly.pid or first,
            "tid": anomaly.tid or first, "ts": at(anomaly.at_ns), "args": {"sigma": anomaly.sigma},
        }  # fmt: skip
