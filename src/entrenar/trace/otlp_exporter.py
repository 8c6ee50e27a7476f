"""Send a trace to an OpenTelemetry collector while it is made, from the tracer's process, in a thread of its own.

The exporters are OpenTelemetry's own (gRPC and HTTP, with their retries). What is traced never waits for them: spans go
into a bounded queue, and if the collector is away for so long that it is full, the oldest are dropped and counted; the
store has them all the same.
"""

import importlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

from entrenar.errors import ConfigError, MachineError
from entrenar.trace.export.otlp import Converter, OtlpSpan
from entrenar.trace.join import Joined
from entrenar.trace.records import Anomaly, Span, TraceInfo

PROTOCOLS = ("auto", "grpc", "http")
_HTTP_PORT, _GRPC_PORT, _JAEGER_PORT = 4318, 4317, 16686
_QUEUE_SPANS = 100_000
_BATCH_SPANS = 512
_BATCH_S = 1.0
_TIMEOUT_S = 5.0
_PATIENCE_S = 15.0  # how long the end of a run waits for a slow collector


def protocol_of(endpoint: str, wanted: str = "auto") -> str:
    """Return grpc or http for an endpoint: by its port or path, if nobody says.

    Raises: ConfigError for an endpoint that is no URL.
    """
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--otlp-endpoint must be a URL such as http://localhost:{_GRPC_PORT}, got {endpoint!r}")
    if wanted != "auto":
        return wanted
    return "http" if parts.port == _HTTP_PORT or parts.path.strip("/") else "grpc"


def viewer_url(endpoint: str) -> str:
    """Return where Jaeger shows the traces of the collector at `endpoint`."""
    return f"http://{urlsplit(endpoint).hostname}:{_JAEGER_PORT}"


class OtlpExport:
    """Sends spans and slow calls as they come. An observer of a session; `close` sends the rest."""

    def __init__(
        self,
        endpoint: str,
        service: str,
        *,
        protocol: str = "auto",
        on_state: Callable[[bool], None] = lambda _: None,
        queue_spans: int = _QUEUE_SPANS,
        timeout_s: float = _TIMEOUT_S,
    ) -> None:
        """Begin to look for the collector; `on_state` hears True when it answers, False when it does not.

        Raises: ConfigError; MachineError if OpenTelemetry's exporters are not installed.
        """
        self._exporter = _exporter(endpoint, protocol_of(endpoint, protocol), timeout_s)
        self._resource = _sdk("resources").Resource({"service.name": service})
        self._on_state = on_state
        self._queue: deque[OtlpSpan] = deque()
        self._limit = queue_spans
        self._converter: Converter | None = None
        self._calls = 0
        self.sent = self.dropped = 0
        self.is_connected: bool | None = None
        self._is_closing = threading.Event()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)
        self._thread.start()

    def begin(self, info: TraceInfo, root_id: int) -> None:
        """Learn the trace that the spans belong to."""
        self._converter = Converter(info, root_id)

    def __call__(self, batch: Joined) -> Sequence[Anomaly]:
        """Queue what came. Never waits."""
        if self._converter is None:
            return ()
        self._converter.opened(batch.opened)
        found = [self._converter.span(span) for span in batch.ended]
        for call in batch.calls:
            self._calls += 1
            if (one := self._converter.call(call, self._calls)) is not None:
                found.append(one)
        self._put(found)
        return ()

    def close(self, spans: Iterable[Span], *, patience_s: float = _PATIENCE_S) -> None:
        """Queue the last spans and send what is queued; give up on a collector that takes longer than `patience_s`."""
        if self._converter is not None:
            self._put([self._converter.span(span) for span in spans])
            self._put(list(self._converter.roots()))
        self._is_closing.set()
        self._wake.set()
        self._thread.join(patience_s)
        self.dropped += len(self._queue)

    def _put(self, spans: Sequence[OtlpSpan]) -> None:
        with self._lock:
            self._queue.extend(spans)
            while len(self._queue) > self._limit:
                self._queue.popleft()
                self.dropped += 1
        if len(self._queue) >= _BATCH_SPANS:
            self._wake.set()

    # ---- the thread ----

    def _run(self) -> None:
        self._note(is_up=self._send(()))
        failures = 0
        while self._queue or not self._is_closing.is_set():
            self._wake.wait(0 if self._is_closing.is_set() else _BATCH_S)
            self._wake.clear()
            if self._send_queue():
                failures = 0
                continue
            if self._is_closing.is_set():
                return
            failures += 1
            time.sleep(min(0.1 * 2**failures, _BATCH_S))

    def _send_queue(self) -> bool:
        """Send what is queued, batch by batch; return whether the collector took it all."""
        while self._queue:
            with self._lock:
                batch = [self._queue.popleft() for _ in range(min(_BATCH_SPANS, len(self._queue)))]
            is_up = self._send(batch)
            self._note(is_up=is_up)
            if not is_up:
                with self._lock:
                    self._queue.extendleft(reversed(batch))
                return False
            self.sent += len(batch)
        return True

    def _note(self, *, is_up: bool) -> None:
        if is_up != self.is_connected:
            self.is_connected = is_up
            self._on_state(is_up)

    def _send(self, batch: Sequence[OtlpSpan]) -> bool:
        readable = [self._readable(span) for span in batch]  # a fault in here is ours, not the collector's
        try:
            result = self._exporter.export(readable)
        except Exception:  # noqa: BLE001 - whatever a transport raises, the collector did not take the batch
            return False
        return bool(result.name == "SUCCESS")

    def _readable(self, span: OtlpSpan) -> Any:
        api = importlib.import_module("opentelemetry.trace")
        flags = api.TraceFlags(api.TraceFlags.SAMPLED)

        def context(trace_id: int, span_id: int) -> Any:
            return api.SpanContext(trace_id, span_id, is_remote=False, trace_flags=flags)

        return _sdk("trace").ReadableSpan(
            name=span.name,
            context=context(span.trace_id, span.span_id),
            parent=context(span.trace_id, span.parent_id) if span.parent_id else None,
            resource=self._resource,
            attributes=span.attributes,
            links=[api.Link(context(*link)) for link in span.links],
            status=api.Status(api.StatusCode(span.status)),
            start_time=span.start_unix_ns,
            end_time=span.end_unix_ns,
            instrumentation_scope=_sdk("util.instrumentation").InstrumentationScope("entrenar.trace"),
        )


def _exporter(endpoint: str, protocol: str, timeout_s: float) -> Any:
    # They write a line of log for each failure; what the reader needs to know is told once, by `on_state`.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    name = f"opentelemetry.exporter.otlp.proto.{protocol}.trace_exporter"
    try:
        exporter = importlib.import_module(name).OTLPSpanExporter
    except ImportError as error:
        raise MachineError(
            "OTLP needs OpenTelemetry's exporters, which are not installed; run pip install 'entrenar[trace]'"
        ) from error
    if protocol == "grpc":
        return exporter(endpoint=endpoint, insecure=urlsplit(endpoint).scheme == "http", timeout=timeout_s)
    path = "" if urlsplit(endpoint).path.strip("/") else "/v1/traces"
    return exporter(endpoint=endpoint.rstrip("/") + path, timeout=timeout_s)


def _sdk(module: str) -> Any:
    return importlib.import_module(f"opentelemetry.sdk.{module}")
