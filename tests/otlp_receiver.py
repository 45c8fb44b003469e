"""A fake OpenTelemetry collector: receives spans over OTLP/gRPC and stores them for a test."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from async_tests import HANG_SECONDS

_FAILED = trace_pb2.Status.STATUS_CODE_ERROR


@dataclass(frozen=True)
class ReceivedSpan:
    """A span and its resource; ids are hexadecimal, times are ns since the Unix epoch."""

    name: str
    service: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    error: str
    attributes: Mapping[str, Any]
    events: tuple[tuple[str, Mapping[str, Any]], ...]

    def steps(self, name: str) -> list[int]:
        """The attributes "fleet.step" of the events with this name."""
        return [attributes["fleet.step"] for each, attributes in self.events if each == name]


@dataclass
class Receiver:
    """Received spans, and the serialized messages. `endpoint` is a value for OTEL_EXPORTER_OTLP_ENDPOINT."""

    endpoint: str = ""
    raw: list[bytes] = field(default_factory=list)
    spans: list[ReceivedSpan] = field(default_factory=list)
    _more: threading.Condition = field(default_factory=threading.Condition)

    def take(self, request: trace_service_pb2.ExportTraceServiceRequest) -> None:
        """Store the spans of a message."""
        with self._more:
            self.raw.append(request.SerializeToString())
            self.spans += _spans_of(request)
            self._more.notify_all()

    def wait_until(
        self, is_enough: Callable[[Sequence[ReceivedSpan]], bool], seconds: float = HANG_SECONDS
    ) -> list[ReceivedSpan]:
        """Wait until `is_enough` accepts the spans; returns all spans. Raises AssertionError after `seconds`."""
        until = time.monotonic() + seconds
        with self._more:
            while not is_enough(self.spans):
                left = until - time.monotonic()
                assert left > 0, f"spans are missing; received spans: {sorted(each.name for each in self.spans)}"
                self._more.wait(left)
            return list(self.spans)


class _Servicer(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc, unused-ignore]
    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def Export(  # noqa: N802 -- name in the .proto
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        del context
        self._receiver.take(request)
        return trace_service_pb2.ExportTraceServiceResponse()


@contextmanager
def receiving(credentials: grpc.ServerCredentials | None = None) -> Iterator[Receiver]:
    """A receiver on a free port of 127.0.0.1; with credentials, it serves TLS."""
    receiver = Receiver()
    server = grpc.server(ThreadPoolExecutor(2))
    add: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
    add(_Servicer(receiver), server)
    if credentials is None:
        receiver.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    else:
        receiver.endpoint = f"https://127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
    server.start()
    try:
        yield receiver
    finally:
        server.stop(None).wait()


def _spans_of(request: trace_service_pb2.ExportTraceServiceRequest) -> Iterator[ReceivedSpan]:
    for resource in request.resource_spans:
        service = _values(resource.resource.attributes)["service.name"]
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield ReceivedSpan(
                    name=span.name,
                    service=service,
                    kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    start=span.start_time_unix_nano,
                    end=span.end_time_unix_nano,
                    error=span.status.message if span.status.code == _FAILED else "",
                    attributes=_values(span.attributes),
                    events=tuple((event.name, _values(event.attributes)) for event in span.events),
                )


def _values(attributes: Iterable[Any]) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
