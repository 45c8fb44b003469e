"""Tracing with OpenTelemetry, if its environment variables enable it. If not, OpenTelemetry is not imported.

Tracing is enabled if OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or OTEL_TRACES_EXPORTER is set,
and disabled if OTEL_SDK_DISABLED is "true" or OTEL_TRACES_EXPORTER is "none". The only supported exporter is "otlp".
The SDK reads all other variables.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from common.errors import Cancelled, HandedOver
from common.logs import get_logger
from common.state.store_url import without_password
from common.trace_context import NO_SPAN, Span, SpanKind, TraceContext, current_span, entered

if TYPE_CHECKING:
    from common.otlp import OtlpTracer

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
EXPORTER = "OTEL_TRACES_EXPORTER"
_DEFAULT_ENDPOINT = "http://localhost:4317"

_log = get_logger(__name__)


class Tracer(Protocol):
    """Creates and exports spans."""

    def start(
        self,
        name: str,
        kind: SpanKind,
        parent: Span,
        attributes: Mapping[str, str | int | float],
        start_ns: int | None = None,
    ) -> Span:
        """Start a child of `parent`; a new trace if `parent` has no context. `start_ns`: Unix time in ns; None: now."""

    def restart(
        self, name: str, kind: SpanKind, parent: TraceContext | None, context: TraceContext, start_ns: int
    ) -> Span:
        """Recreate a span that another process started and cannot end, with its ids and start time."""

    def close(self) -> None:
        """Export the ended spans, for a bounded time."""


@dataclass(frozen=True)
class NotExported:
    """Reason why spans are not exported although tracing is enabled, and the correction."""

    reason: str
    advice: str


_tracer: Tracer | None = None
_users = 0


def tracer() -> Tracer | None:
    """Return the tracer of this process; None if no spans are exported."""
    return _tracer


def start_span(name: str, kind: SpanKind = SpanKind.INTERNAL, **attributes: str | int | float) -> Span:
    """Start a child of the current span. The caller must end it. Outside a trace, the span records nothing."""
    parent = current_span()
    if _tracer is None or parent.context is None:
        return NO_SPAN
    return _tracer.start(name, kind, parent, attributes)


def span(
    name: str, kind: SpanKind = SpanKind.INTERNAL, **attributes: str | int | float
) -> AbstractContextManager[Span]:
    """Return a context that runs in a child of the current span. An exception marks the span as failed."""
    if _tracer is None or (parent := current_span()).context is None:
        return nullcontext(NO_SPAN)
    return ending(_tracer.start(name, kind, parent, attributes))


@contextmanager
def ending(span: Span) -> Iterator[Span]:
    """Make a span the current span within the block, and end it afterwards.

    An exception is recorded by its class name only. Cancellation and hand-over do not mark the span as failed.
    """
    try:
        with entered(span):
            yield span
    except (Cancelled, asyncio.CancelledError):
        span.set(cancelled=True)
        raise
    except HandedOver:
        span.set(handed_over=True)
        raise
    except BaseException as error:
        span.fail(type(error).__name__)
        raise
    finally:
        span.end()


@contextmanager
def traced_stage(timed: AbstractContextManager[None], stage: str) -> Iterator[None]:
    """Run a stage in its span and in the context `timed`."""
    with span(f"stage {stage}"), timed:
        yield


@contextmanager
def exporting(service: str, environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Export the spans of this process within the block, if tracing is enabled. Nested uses share the exporter.

    Does not raise: if spans cannot be exported, one warning is logged.
    """
    global _tracer, _users
    if not _users and is_wanted(environ):
        _tracer = _opened(service, environ)
    _users += 1
    try:
        yield
    finally:
        _users -= 1
        if not _users and _tracer is not None:
            _tracer.close()
            _tracer = None


def is_wanted(environ: Mapping[str, str]) -> bool:
    """Return whether the environment variables enable tracing."""
    exporter = environ.get(EXPORTER, "").strip().lower()
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or exporter == "none":
        return False
    return bool(exporter) or any(environ.get(name) for name in ENDPOINTS)


def collector_url(environ: Mapping[str, str]) -> str:
    """Return the URL of the collector, without the password."""
    return without_password(next((environ[name] for name in ENDPOINTS if environ.get(name)), _DEFAULT_ENDPOINT))


def load_exporter(service: str, environ: Mapping[str, str]) -> OtlpTracer | NotExported:
    """Return the exporter, or the reason why it cannot be created."""
    exporter = environ.get(EXPORTER, "").strip().lower()
    if exporter not in ("", "otlp"):
        return NotExported(f"{EXPORTER} is {environ[EXPORTER]!r}", "otlp and none are supported")
    name = next((each for each in _PROTOCOLS if environ.get(each)), "")
    if name and environ[name].strip().lower() != "grpc":
        return NotExported(f"{name} is {environ[name]!r}", "grpc is supported")
    try:
        # OpenTelemetry is an optional extra, and its import takes 0.2 s and 20 MB.
        from common.otlp import OtlpTracer
    except ModuleNotFoundError as error:
        given = ", ".join(each for each in (*ENDPOINTS, EXPORTER) if environ.get(each))
        return NotExported(
            f"{error.name} is not installed", f"pip install 'diffusion-fleet[tracing]', or unset {given}"
        )
    try:
        return OtlpTracer(service, collector_url(environ))
    except Exception as error:  # noqa: BLE001  (the SDK raises its own exceptions for invalid variables)
        return NotExported(f"an OTEL_ variable is invalid: {without_password(str(error))}", "correct or unset it")


def _opened(service: str, environ: Mapping[str, str]) -> Tracer | None:
    """Return the exporter; None, with a warning, if it cannot be created."""
    found = load_exporter(service, environ)
    if isinstance(found, NotExported):
        _log.warning("no traces are exported", reason=found.reason, advice=found.advice)
        return None
    return found
