"""A trace as plain values for JSON and CSV."""

import csv
import io
from collections.abc import Iterator
from typing import Any

from entrenar.trace.hot_paths import Profile, responsible
from entrenar.trace.reader import Reader
from entrenar.trace.records import Span, SystemCall, TraceInfo

FORMAT = "entrenar-trace-json-v1"
_PERCENTILES = {"p50_us": 0.5, "p75_us": 0.75, "p90_us": 0.9, "p95_us": 0.95, "p99_us": 0.99}
_COLUMNS = (
    "name", "pid", "tid", "start_unix_ns", "duration_us", "result", "error", "size_bytes", "path", "file", "line",
    "function", "span",
)  # fmt: skip


def as_json(reader: Reader, profile: Profile) -> dict[str, Any]:
    """Return everything: the command, hot paths, statistics, each call that was kept, and spans."""
    info = reader.info()
    return {
        "format": FORMAT,
        "command": list(info.command),
        "trace_id": f"{info.trace_id:032x}",
        "backend": info.backend,
        "exit_code": info.exit_code,
        "wall_us": profile.wall_ns / 1e3,
        "floor_us": info.floor_ns / 1e3,
        "notes": list(info.notes),
        "summary": {
            "functions": profile.functions,
            "syscalls": profile.calls,
            "syscall_time_us": profile.call_ns / 1e3,
            "hot_paths": [
                {
                    "kind": row.kind, "name": row.name, "file": row.file or None, "line": row.line or None,
                    "share": row.share, "total_us": row.total_ns / 1e3, "syscalls": row.calls, "slow_io": row.slow,
                }
                for row in profile.rows
            ],
            "statistics": [
                {
                    "syscall": row.name, "calls": row.calls, "errors": row.errors, "total_us": row.total_ns / 1e3,
                    "max_us": row.max_ns / 1e3, "size_bytes": row.size_bytes,
                    **{key: row.percentile_ns(share) / 1e3 for key, share in _PERCENTILES.items()},
                }
                for row in profile.statistics
            ],
        },
        "syscalls": [call_json(call, info) for call in reader.calls()],
        "spans": [span_json(span, info) for span in reader.spans()],
    }  # fmt: skip


def call_json(call: SystemCall, info: TraceInfo) -> dict[str, Any]:
    """Return a call, with the frame a person would name for it and its whole stack."""
    frame = responsible(call.stack) if call.stack else None
    return {
        "name": call.name,
        "pid": call.pid,
        "tid": call.tid,
        "start_unix_ns": call.start_ns + info.unix_offset_ns,
        "duration_us": None if call.duration_ns is None else call.duration_ns / 1e3,
        "result": call.result,
        "error": call.error,
        "size_bytes": call.size_bytes,
        "path": call.path,
        "source": frame and {"file": frame.file, "line": frame.line, "function": frame.function},
        "stack": [f"{one.file}:{one.line} {one.function}" for one in call.stack],
        "span": None if call.span is None else f"{call.span:016x}",
    }


def span_json(span: Span, info: TraceInfo) -> dict[str, Any]:
    """Return a span."""
    return {
        "id": f"{span.id:016x}",
        "parent": None if span.parent is None else f"{span.parent:016x}",
        "name": span.name,
        "pid": span.pid,
        "tid": span.tid,
        "start_unix_ns": span.start_ns + info.unix_offset_ns,
        "duration_us": None if span.duration_ns is None else span.duration_ns / 1e3,
        "status": span.status,
        "attributes": dict(span.attributes),
    }


def as_csv(reader: Reader) -> Iterator[str]:
    """Yield a header and a line for each call that was kept."""
    info = reader.info()
    yield _csv_line(_COLUMNS)
    for call in reader.calls():
        row = call_json(call, info)
        source = row["source"] or {}
        yield _csv_line([source.get(name) if name in ("file", "line", "function") else row[name] for name in _COLUMNS])


def _csv_line(values: Any) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(values)
    return line.getvalue()
