"""Exports spans of the OpenTelemetry SDK by OTLP over gRPC. Imported only if tracing is enabled: see common.tracing."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import NonRecordingSpan, SpanContext, StatusCode, TraceFlags, set_span_in_context
from opentelemetry.trace import Span as SdkSpan
from opentelemetry.trace import SpanKind as SdkSpanKind
from opentelemetry.trace.span import TraceState

from common.logs import get_logger
from common.trace_context import Span, SpanKind, TraceContext

_FILES = (
    "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY",
    "OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_CLIENT_KEY",
    "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE",
)
_CLOSE_SECONDS = 2.0  # timeout for exporting the last spans
_KINDS = {kind: SdkSpanKind[kind.value] for kind in SpanKind}

_log = get_logger(__name__)

Attributes = Mapping[str, str | int | float]


class OtlpTracer:
    """Exports the spans of a process in the background. `collector` is the endpoint in log lines.

    OTEL_ variables set sampler, limits, batches, endpoint, headers and certificates. Raises ValueError for a variable
    that is not a number, and OSError for a file that cannot be read.
    """

    def __init__(self, service: str, collector: str) -> None:
        for name in _FILES:
            if path := os.environ.get(name):
                _check_readable(name, path)
        self._ids = _Ids()
        self._provider = TracerProvider(resource=_resource(service), id_generator=self._ids, shutdown_on_exit=False)
        self._exporter = _OneWarning(OTLPSpanExporter(), collector)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("diffusion-fleet", version("diffusion-fleet"))

    def start(
        self, name: str, kind: SpanKind, parent: Span, attributes: Attributes, start_ns: int | None = None
    ) -> Span:
        """Start a child of `parent`; a new trace if `parent` has no context. `start_ns`: Unix time in ns; None: now."""
        started = self._tracer.start_span(
            name, _context_of(parent), kind=_KINDS[kind], attributes=_prefixed(attributes), start_time=start_ns
        )
        return _OtlpSpan(started, start_ns or 0)

    def restart(
        self, name: str, kind: SpanKind, parent: TraceContext | None, context: TraceContext, start_ns: int
    ) -> Span:
        """Recreate a span that another process started, with its ids and start time."""
        if not context.sampled:
            return Span(context)
        with self._ids.preset(int(context.trace_id, 16), int(context.span_id, 16)):
            return self.start(name, kind, Span(parent), {}, start_ns)

    def reaches_collector(self, seconds: int) -> bool:
        """Return whether the collector accepts a request without spans."""
        exporter = OTLPSpanExporter(timeout=seconds)
        try:
            return exporter.export([]) is SpanExportResult.SUCCESS
        finally:
            exporter.shutdown()

    def close(self) -> None:
        """Export the ended spans, for at most a few seconds."""
        if self._exporter.is_failing:
            self._exporter.shutdown()  # interrupts the backoff of a retry
        closing = threading.Thread(target=self._provider.shutdown, name="otlp-close", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)
        if closing.is_alive():
            self._exporter.warn()


def _check_readable(name: str, path: str) -> None:
    try:
        with open(path, "rb"):
            return
    except OSError as error:
        raise OSError(f"{name}: {path} cannot be read: {error.strerror}") from error


def _resource(service: str) -> Resource:
    """Return the resource. OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES override the attributes set here."""
    instance = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    found = Resource.create({"fleet.service": service, "service.instance.id": instance})
    if str(found.attributes.get("service.name", "")).startswith("unknown_service"):
        return found.merge(Resource({"service.name": f"fleet-{service}"}))
    return found


def _prefixed(attributes: Attributes) -> dict[str, str | int | float]:
    return {f"fleet.{name}": value for name, value in attributes.items()}


def _context_of(span: Span) -> Context:
    """Return an OpenTelemetry context that contains the span."""
    if isinstance(span, _OtlpSpan):
        return span.as_parent
    context = span.context
    if context is None:
        return Context()
    state = TraceState.from_header([context.state]) if context.state else TraceState()
    remote = SpanContext(
        int(context.trace_id, 16), int(context.span_id, 16), True, TraceFlags(context.flags), trace_state=state
    )
    return set_span_in_context(NonRecordingSpan(remote), Context())


class _OtlpSpan(Span):
    """Wraps a span of the SDK. A span that is not sampled records nothing."""

    __slots__ = ("_not_before_ns", "_span", "as_parent")

    def __init__(self, span: SdkSpan, not_before_ns: int) -> None:
        own = span.get_span_context()
        state = own.trace_state.to_header()
        super().__init__(TraceContext(f"{own.trace_id:032x}", f"{own.span_id:016x}", int(own.trace_flags), state))
        self._span = span
        self._not_before_ns = not_before_ns
        self.as_parent = set_span_in_context(span, Context())

    def event(self, name: str, **attributes: str | int | float) -> None:
        if self._span.is_recording():
            self._span.add_event(name, _prefixed(attributes))

    def set(self, **attributes: str | int | float) -> None:
        if self._span.is_recording():
            self._span.set_attributes(_prefixed(attributes))

    def fail(self, what: str) -> None:
        if self._span.is_recording():
            self._span.set_status(StatusCode.ERROR, what)

    def end(self) -> None:
        if self._span.is_recording():
            self._span.end(max(time.time_ns(), self._not_before_ns))  # another host's clock may have set the start time


class _Ids(RandomIdGenerator):
    """Generates random ids, except for spans that are recreated."""

    def __init__(self) -> None:
        self._preset = threading.local()

    def preset(self, trace_id: int, span_id: int) -> _Preset:
        """Return a context in which this thread starts spans with these ids."""
        return _Preset(self._preset, trace_id, span_id)

    def generate_span_id(self) -> int:
        """Return the id of the next span of this thread."""
        found: tuple[int, int] | None = vars(self._preset).get("ids")
        return super().generate_span_id() if found is None else found[1]

    def generate_trace_id(self) -> int:
        """Return the id of the next trace that this thread starts."""
        found: tuple[int, int] | None = vars(self._preset).get("ids")
        return super().generate_trace_id() if found is None else found[0]


class _Preset:
    def __init__(self, local: threading.local, trace_id: int, span_id: int) -> None:
        self._fields = vars(local)
        self._ids = (trace_id, span_id)

    def __enter__(self) -> None:
        self._fields["ids"] = self._ids

    def __exit__(self, *_: object) -> None:
        del self._fields["ids"]


class _OneWarning(SpanExporter):
    """Exports spans, and logs one warning each time the collector becomes unavailable.

    The SDK would log one line for each failed export and for each span that its full queue drops.
    """

    def __init__(self, exporter: OTLPSpanExporter, collector: str) -> None:
        self._exporter = exporter
        self._collector = collector
        self.is_failing = False
        for name in ("opentelemetry.exporter.otlp", "opentelemetry.sdk._shared_internal"):
            logging.getLogger(name).setLevel(logging.CRITICAL)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Export spans. Spans that cannot be exported are dropped."""
        result = self._exporter.export(spans)
        failed = result is not SpanExportResult.SUCCESS
        if failed:
            self.warn()
        elif self.is_failing:
            _log.info("trace collector is available again")
        self.is_failing = failed
        return result

    def warn(self) -> None:
        """Log once that spans are dropped."""
        if not self.is_failing:
            _log.warning("spans are dropped while the trace collector is unavailable", endpoint=self._collector)
        self.is_failing = True

    def shutdown(self) -> None:
        """Shut the exporter down, including a retry that waits."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Return True: this exporter has no buffer."""
        del timeout_millis
        return True
