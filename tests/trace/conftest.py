"""An OTLP receiver in this process, HTTP and gRPC, that keeps what it gets; it can be told to answer 500 or to hang."""

import gzip
import threading
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service


class Collector:
    """Spans by name, and the service that sent them."""

    def __init__(self, *, status=200, hang=None):
        self.spans, self.services, self.requests = [], set(), 0
        self.status, self.hang = status, hang
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self._grpc = grpc.server(futures.ThreadPoolExecutor(2))
        service.add_TraceServiceServicer_to_server(self, self._grpc)
        port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._grpc.start()
        self.http, self.grpc = f"http://127.0.0.1:{self._http.server_address[1]}/v1/traces", f"http://127.0.0.1:{port}"

    def close(self):
        if self.hang is not None:
            self.hang.set()
        self._http.shutdown()
        self._http.server_close()
        self._grpc.stop(0).wait()

    def Export(self, request, context):  # noqa: N802 - the service's name
        if self.hang is not None:
            self.hang.wait(60)
        if self.status != 200:
            context.abort(grpc.StatusCode.INTERNAL, "out of order")
        self.take(request)
        return messages.ExportTraceServiceResponse()

    def take(self, request):
        self.requests += 1
        for resource in request.resource_spans:
            self.services |= {item.value.string_value for item in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def _handler(self):
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                if collector.hang is not None:
                    collector.hang.wait(60)
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                self.send_response(collector.status)
                self.end_headers()
                if collector.status == 200:
                    collector.take(messages.ExportTraceServiceRequest.FromString(body))
                    self.wfile.write(messages.ExportTraceServiceResponse().SerializeToString())

            def log_message(self, *_):
                pass

        return Handler


@pytest.fixture
def collector():
    """An OTLP receiver, HTTP and gRPC."""
    one = Collector()
    yield one
    one.close()


@pytest.fixture
def hanging_collector():
    """One that takes a request and never answers."""
    one = Collector(hang=threading.Event())
    yield one
    one.close()
