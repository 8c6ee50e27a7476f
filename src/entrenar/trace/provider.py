"""The recorder behind the OpenTelemetry API: a program that calls the API is recorded without a change to it.

The API loads the provider that OTEL_PYTHON_TRACER_PROVIDER names from the entry points of installed packages; ours is
"entrenar". It records to the folder that the tracer names (`launch.py`); without a tracer, nothing is recorded.
A span here costs a few microseconds, an SDK's with an exporter 27 (`benchmarks/tracing.py`).
"""

import os
import time
import traceback
from collections.abc import Mapping
from typing import Any

from opentelemetry import trace as api
from opentelemetry.context import Context

from entrenar.trace import garbage
from entrenar.trace.launch import Wants, wanted
from entrenar.trace.recorder import Recorder

_FLAGS = api.TraceFlags(api.TraceFlags.SAMPLED)
_OK, _ERROR = 1, 2


def from_environment() -> api.TracerProvider:
    """Return the provider for this process; one that does nothing if nobody collects. Never fails."""
    try:
        wants = wanted(os.environ)
        return api.NoOpTracerProvider() if wants is None else _recording(wants)
    except Exception:  # noqa: BLE001 - the traced program must not notice
        return api.NoOpTracerProvider()


def _recording(wants: Wants) -> "Provider":
    provider = Provider(Recorder(wants.folder), wants)
    garbage.watch(provider.recorder, lambda: api.get_current_span().get_span_context().span_id or wants.parent)
    return provider


class Provider(api.TracerProvider):
    """Gives tracers that record."""

    def __init__(self, recorder: Recorder, wants: Wants) -> None:
        self.recorder, self.wants = recorder, wants

    def get_tracer(self, *_: Any, **__: Any) -> api.Tracer:
        """Return a tracer; all are alike."""
        return _Tracer(self)


class _Tracer(api.NoOpTracer):
    """Overrides what makes a span; the API's own code around it keeps the context."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider

    def start_span(
        self,
        name: str,
        context: Context | None = None,
        kind: api.SpanKind = api.SpanKind.INTERNAL,
        attributes: Any = None,
        links: Any = None,
        start_time: int | None = None,
        record_exception: bool = True,  # noqa: FBT001, FBT002
        set_status_on_exception: bool = True,  # noqa: FBT001, FBT002
    ) -> api.Span:
        """Begin a span under the current one."""
        del kind, record_exception, set_status_on_exception  # `use_span` heeds the last two
        parent = api.get_current_span(context).get_span_context()
        span = RecordedSpan(self._provider, parent.span_id or self._provider.wants.parent, name, start_time, attributes)
        for link in links or ():
            span.add_link(link.context, link.attributes)
        return span


class RecordedSpan(api.Span):
    """A span of the API, in the recorder."""

    def __init__(
        self,
        provider: Provider,
        parent: int,
        name: str,
        start_unix_ns: int | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        self._recorder = provider.recorder
        self._status = 0
        self._is_ended = False
        self._attributes: dict[str, Any] = {}
        at = None if start_unix_ns is None else _monotonic(start_unix_ns)
        # What is known at the start is written at the start: it is there while the span lasts, and if it never ends.
        number = self._recorder.start(parent, name, at, attributes=attributes)
        self._context = api.SpanContext(provider.wants.trace_id, number, is_remote=False, trace_flags=_FLAGS)

    def end(self, end_time: int | None = None) -> None:
        """End the span; a second time does nothing."""
        if self._is_ended:
            return
        self._is_ended = True
        at = None if end_time is None else _monotonic(end_time)
        self._recorder.end(self._context.span_id, at, status=self._status, attributes=self._attributes)

    def get_span_context(self) -> api.SpanContext:
        """Return trace id and span id."""
        return self._context

    def set_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Set several attributes."""
        self._attributes |= attributes

    def set_attribute(self, key: str, value: Any) -> None:
        """Set an attribute."""
        self._attributes[key] = value

    def add_event(self, name: str, attributes: Any = None, timestamp: int | None = None) -> None:
        """Record an instant under this span."""
        del timestamp
        self._recorder.mark(self._context.span_id, name, _described(attributes))

    def add_link(self, context: api.SpanContext, attributes: Any = None) -> None:
        """Link to a span of any trace."""
        del attributes
        links = self._attributes.setdefault("links", [])
        links.append([f"{context.trace_id:032x}", f"{context.span_id:016x}"])

    def update_name(self, name: str) -> None:
        """Rename: the recorder keeps the name a span began with, so that the new one is an attribute."""
        self._attributes["name"] = name

    def is_recording(self) -> bool:
        """Return whether attributes still matter."""
        return not self._is_ended

    def set_status(self, status: Any, description: str | None = None) -> None:
        """Set the status: unset, ok or error."""
        code = getattr(status, "status_code", status)
        self._status = {api.StatusCode.OK: _OK, api.StatusCode.ERROR: _ERROR}.get(code, 0)
        text = description or getattr(status, "description", None)
        if text:
            self._attributes["error.message"] = text

    def record_exception(
        self,
        exception: BaseException,
        attributes: Any = None,
        timestamp: int | None = None,
        escaped: bool = False,  # noqa: FBT001, FBT002 - the API's signature
    ) -> None:
        """Record an exception as an event."""
        del attributes, timestamp, escaped
        text = "".join(traceback.format_exception_only(exception)).strip()
        self._recorder.mark(self._context.span_id, "exception", text)


def _described(attributes: Any) -> str:
    return " ".join(f"{key}={value}" for key, value in (attributes or {}).items())


def _monotonic(unix_ns: int) -> int:
    return unix_ns - time.time_ns() + time.monotonic_ns()
