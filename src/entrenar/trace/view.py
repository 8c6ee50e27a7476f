"""A trace as one HTML page without any other file: timeline, flame graph, hot paths, system calls, diagnosis.

The page holds the data as JSON and draws it itself, so that it opens from a disk, a mail or a CI artifact. Of a long
trace it holds the longest spans and the slowest calls; how many were left out is written on it.
"""

import heapq
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from entrenar.trace.export.stacks import Stack, call_stacks, span_stacks
from entrenar.trace.hot_paths import profile, responsible
from entrenar.trace.reader import Reader
from entrenar.trace.records import Anomaly, Span, SystemCall
from entrenar.trace.report_text import label

MAX_SPANS = 40_000
MAX_CALLS = 20_000
_HOT_PATHS = 50
_TEMPLATE = "view.html"
_PLACE = '"@DATA@"'


def page(reader: Reader, diagnosis: Sequence[str] = ()) -> str:
    """Return the page; `diagnosis` are the lines of a diagnosis to put on it."""
    template = files(__package__).joinpath(_TEMPLATE).read_text("utf-8")
    # "</" would end the script in which the data lies.
    data = json.dumps(_data(reader, diagnosis), separators=(",", ":"), default=str).replace("</", "<\\/")
    return template.replace(_PLACE, data)


def _data(reader: Reader, diagnosis: Sequence[str]) -> dict[str, Any]:
    info, summary = reader.info(), profile(reader)
    end_ns = info.ended_ns or max((span.end_ns or span.start_ns for span in reader.spans()), default=info.started_ns)
    spans = heapq.nlargest(MAX_SPANS, reader.spans(), key=lambda span: (span.end_ns or end_ns) - span.start_ns)
    calls = heapq.nlargest(MAX_CALLS, reader.calls(), key=lambda call: call.duration_ns or 0)
    return {
        "command": " ".join(info.command),
        "backend": info.backend,
        "exitCode": info.exit_code,
        "wall": (end_ns - info.started_ns) / 1e3,
        "floor": info.floor_ns / 1e3,
        "notes": [*info.notes, *_left_out(reader, spans, calls)],
        "diagnosis": [line for line in diagnosis if line != "Diagnosis:"],
        "hotPaths": [
            [row.share, row.total_ns / 1e3, row.calls, row.slow, label(row, with_source=True)]
            for row in summary.rows[:_HOT_PATHS]
        ],
        "statistics": [
            [row.name, row.calls, row.errors, row.total_ns / 1e3, row.percentile_ns(0.5) / 1e3,
             row.percentile_ns(0.99) / 1e3, row.max_ns / 1e3]
            for row in summary.statistics
        ],
        "threads": _threads(reader, spans, calls),
        "spans": sorted((_span(span, info.started_ns, end_ns) for span in spans), key=lambda row: (row[0], -row[1])),
        "calls": sorted((_call(call, info.started_ns) for call in calls), key=lambda row: row[0]),
        "anomalies": [_anomaly(one, info.started_ns) for one in reader.anomalies()],
        "flames": [
            {"name": "system calls by function", "tree": _tree(call_stacks(reader))},
            {"name": "spans", "tree": _tree(span_stacks(reader))},
        ],
    }  # fmt: skip


def _left_out(reader: Reader, spans: Sequence[Span], calls: Sequence[SystemCall]) -> list[str]:
    notes = []
    for name, shown, table in (("spans", len(spans), "span"), ("system calls", len(calls), "call")):
        total = reader.count(table)
        if total > shown:
            notes.append(f"the page shows the longest {shown:,} of {total:,} {name}; the trace file has them all")
    return notes


def _threads(reader: Reader, spans: Sequence[Span], calls: Sequence[SystemCall]) -> list[list[Any]]:
    """Return [thread, label] of all threads, in the order of their processes."""
    order = {process.pid: at for at, process in enumerate(reader.processes())}
    ranks = {process.pid: process.rank for process in reader.processes()}
    found = {(one.pid, one.tid) for one in spans} | {(one.pid, one.tid) for one in calls}
    ordered = sorted(found, key=lambda pair: (order.get(pair[0], len(order)), pair[1] != pair[0], pair[1]))
    return [
        [tid, f"{'' if ranks.get(pid) is None else f'rank {ranks[pid]}, '}process {pid}, thread {tid}"]
        for pid, tid in ordered
    ]


def _span(span: Span, started_ns: int, ended_ns: int) -> list[Any]:
    end = span.end_ns if span.end_ns is not None else ended_ns
    details = {**span.attributes, **({} if span.end_ns is not None else {"never ended": True})}
    return [(span.start_ns - started_ns) / 1e3, (end - span.start_ns) / 1e3, span.tid, span.name, details]


def _call(call: SystemCall, started_ns: int) -> list[Any]:
    frame = responsible(call.stack) if call.stack else None
    source = f"{frame.file}:{frame.line} in {frame.function}" if frame else ""
    moved = "" if call.size_bytes is None else f"{call.size_bytes} bytes"
    result = call.error or moved
    at = (call.start_ns - started_ns) / 1e3
    return [at, (call.duration_ns or 0) / 1e3, call.tid, call.name, call.path or "", result, source]


def _anomaly(one: Anomaly, started_ns: int) -> list[Any]:
    return [(one.at_ns - started_ns) / 1e3, one.tid, one.severity, one.operation, one.duration_ns / 1e3, one.sigma]


def _tree(stacks: dict[Stack, tuple[int, int]]) -> dict[str, Any]:
    """Return the stacks as a tree of {name, value in microseconds, count, children}, values with their children's."""
    root: dict[str, Any] = {"n": "all", "v": 0.0, "c": 0, "k": {}}
    for stack, (ns, count) in stacks.items():
        node = root
        node["v"] += ns / 1e3
        for frame in stack:
            node = node["k"].setdefault(frame, {"n": frame, "v": 0.0, "c": 0, "k": {}})
            node["v"] += ns / 1e3
        node["c"] += count
    return _listed(root)


def _listed(node: dict[str, Any]) -> dict[str, Any]:
    children = sorted((_listed(child) for child in node["k"].values()), key=lambda child: -child["v"])
    return {"n": node["n"], "v": round(node["v"], 3), "c": node["c"], "k": children}
