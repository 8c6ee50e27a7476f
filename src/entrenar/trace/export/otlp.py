"""Convert a trace to OTLP: spans and system calls in OpenTelemetry's data model, as JSON or as exporter records.

The trace of a week has no end that a viewer could show: after every `STRETCH` steps a new trace begins, whose root is
linked to the step's place in the first one, and back. Attributes follow the semantic conventions (code.function.name,
code.file.path, code.line.number, thread.id, process.*).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from entrenar.trace.hot_paths import responsible
from entrenar.trace.reader import Reader
from entrenar.trace.records import Span, SystemCall, TraceInfo

STRETCH = 100
# A call that lasted less is in the store, not in the collector: a trace viewer shows hundreds of spans, not millions.
SHORTEST_CALL_NS = 200_000
# How programs ask whether something is there: no error of the program.
_QUESTIONS = frozenset(("ENOENT", "EAGAIN", "ENOTTY", "ESPIPE", "EINTR", "EEXIST", "ECHILD", "ENOTCONN", "EINPROGRESS"))
_STATUS = {"unset": 0, "ok": 1, "error": 2}
_STEP = "entrenar.step"
_KIND_INTERNAL = 1


@dataclass(frozen=True, slots=True)
class OtlpSpan:
    """A span as OTLP has it: Unix nanoseconds, ids as numbers, 0 for no parent."""

    trace_id: int
    span_id: int
    parent_id: int
    name: str
    start_unix_ns: int
    end_unix_ns: int
    status: int = 0
    attributes: Mapping[str, Any] = field(default_factory=dict)
    links: tuple[tuple[int, int], ...] = ()


class Converter:
    """Turns spans and calls into OTLP's, and cuts a long run into stretches of steps."""

    def __init__(self, info: TraceInfo, root_id: int, *, stretch: int = STRETCH) -> None:
        self._info, self._root_id, self._stretch = info, root_id, stretch
        # For the spans of a step that is under way: which stretch they belong to.
        self._stretch_of: dict[int, int] = {}
        self._bounds: dict[int, list[int]] = {}

    def opened(self, spans: Iterable[Span]) -> None:
        """Learn which stretch the spans that just began belong to."""
        for span in spans:
            if span.name == "step":
                number = int(span.attributes.get(_STEP, 0))
                stretch = (number - 1) // self._stretch if number else -1
            else:
                stretch = self._stretch_of.get(span.parent or 0, -1)
            if stretch >= 0:
                self._stretch_of[span.id] = stretch

    def span(self, span: Span) -> OtlpSpan:
        """Return a span that ended."""
        self.opened((span,))
        stretch = self._stretch_of.get(span.id, -1) if self._stretch else -1
        start, end = self._unix(span.start_ns), self._unix(span.end_ns if span.end_ns is not None else span.start_ns)
        attributes = {**span.attributes, "thread.id": span.tid, "process.pid": span.pid}
        trace_id, parent, links = self._info.trace_id, span.parent or 0, span.links
        if stretch > 0:
            trace_id = self._trace_of(stretch)
            bounds = self._bounds.setdefault(stretch, [start, end])
            bounds[:] = [min(bounds[0], start), max(bounds[1], end)]
            if span.name == "step":
                links = (*links, (self._info.trace_id, parent))
                parent = self._root_of(stretch)
        return OtlpSpan(trace_id, span.id, parent, span.name, start, end, _STATUS[span.status], attributes, links)

    def call(self, call: SystemCall, number: int) -> OtlpSpan | None:
        """Return a system call as the child of its span; None for a short one. `number` makes its id."""
        if call.duration_ns is None or call.duration_ns < SHORTEST_CALL_NS:
            return None
        attributes: dict[str, Any] = {
            "syscall.name": call.name, "syscall.result": call.result, "thread.id": call.tid, "process.pid": call.pid,
            "syscall.size_bytes": call.size_bytes, "file.path": call.path, "error.type": call.error,
        }  # fmt: skip
        if call.stack:
            frame = responsible(call.stack)
            attributes |= {"code.function.name": frame.function, "code.file.path": frame.file}
            attributes["code.line.number"] = frame.line
        stretch = self._stretch_of.get(call.span or 0, -1) if self._stretch else -1
        start = self._unix(call.start_ns)
        is_error = call.error is not None and call.error not in _QUESTIONS
        return OtlpSpan(
            self._trace_of(stretch) if stretch > 0 else self._info.trace_id, (0xFF << 56) | number,
            call.span or self._root_id, f"syscall: {call.name}", start, start + call.duration_ns, 2 * is_error,
            {key: value for key, value in attributes.items() if value is not None},
        )  # fmt: skip

    def roots(self) -> Iterator[OtlpSpan]:
        """Yield the roots of the stretches, each linked to the root of the run."""
        for stretch, (start, end) in sorted(self._bounds.items()):
            first = stretch * self._stretch + 1
            yield OtlpSpan(
                self._trace_of(stretch), self._root_of(stretch), 0, f"steps {first}-{first + self._stretch - 1}",
                start, end, 0, {}, ((self._info.trace_id, self._root_id),),
            )  # fmt: skip

    def _unix(self, time_ns: int) -> int:
        return time_ns + self._info.unix_offset_ns

    def _trace_of(self, stretch: int) -> int:
        return self._info.trace_id ^ stretch

    def _root_of(self, stretch: int) -> int:
        return self._root_id ^ (stretch << 8)


def otlp_spans(reader: Reader, *, stretch: int = STRETCH) -> Iterator[OtlpSpan]:
    """Yield everything in a trace as OTLP's spans."""
    info = reader.info()
    root = next((span.id for span in reader.spans() if span.name.startswith("process: ")), 1)
    converter = Converter(info, root, stretch=stretch)
    for span in reader.spans():
        yield converter.span(span if span.end_ns is not None else replace(span, end_ns=info.ended_ns))
    for number, call in enumerate(reader.calls(), 1):
        found = converter.call(call, number)
        if found is not None:
            yield found
    yield from converter.roots()


def otlp_json(spans: Iterable[OtlpSpan], service: str) -> dict[str, Any]:
    """Return OTLP's JSON encoding: ids as hex, 64-bit integers as strings."""
    return {
        "resourceSpans": [{
            "resource": {"attributes": [_attribute("service.name", service)]},
            "scopeSpans": [{"scope": {"name": "entrenar.trace"}, "spans": [_json(span) for span in spans]}],
        }]
    }  # fmt: skip


def _json(span: OtlpSpan) -> dict[str, Any]:
    values: dict[str, Any] = {
        "traceId": f"{span.trace_id:032x}",
        "spanId": f"{span.span_id:016x}",
        "name": span.name,
        "kind": _KIND_INTERNAL,
        "startTimeUnixNano": str(span.start_unix_ns),
        "endTimeUnixNano": str(span.end_unix_ns),
        "attributes": [_attribute(key, value) for key, value in span.attributes.items()],
        "status": {"code": span.status} if span.status else {},
    }
    if span.parent_id:
        values["parentSpanId"] = f"{span.parent_id:016x}"
    if span.links:
        values["links"] = [{"traceId": f"{trace:032x}", "spanId": f"{other:016x}"} for trace, other in span.links]
    return values


def _attribute(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"key": key, "value": {"boolValue": value}}
    if isinstance(value, int):
        return {"key": key, "value": {"intValue": str(value)}}
    if isinstance(value, float):
        return {"key": key, "value": {"doubleValue": value}}
    return {"key": key, "value": {"stringValue": str(value)}}
