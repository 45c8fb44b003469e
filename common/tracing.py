"""Spans, exported by OpenTelemetry where its environment variables ask for it, and otherwise free of cost and imports.

Traces are on where OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set, or OTEL_TRACES_EXPORTER is
"otlp", unless OTEL_SDK_DISABLED is "true" or OTEL_TRACES_EXPORTER is "none". The SDK reads all other variables.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from common.errors import Cancelled, HandedOver
from common.logs import get_logger
from common.trace_context import NO_SPAN, Span, SpanKind, TraceContext, current_span, entered

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_EXPORTER = "OTEL_TRACES_EXPORTER"

_log = get_logger(__name__)


class Tracer(Protocol):
    """Makes spans and exports them."""

    def start(
        self,
        name: str,
        kind: SpanKind,
        parent: Span,
        attributes: Mapping[str, str | int | float],
        start_ns: int | None = None,
    ) -> Span:
        """Start a span below `parent`, or a new trace where that has no context. `start_ns`: since 1970; None: now."""

    def restart(
        self, name: str, kind: SpanKind, parent: TraceContext | None, context: TraceContext, start_ns: int
    ) -> Span:
        """Start a span again that another process started and cannot end: with its ids and its start."""

    def close(self) -> None:
        """Export what has ended, for a bounded time."""


_tracer: Tracer | None = None
_users = 0


def tracer() -> Tracer | None:
    """What exports the spans of this process; None where nothing does."""
    return _tracer


def start_span(name: str, kind: SpanKind = SpanKind.INTERNAL, **attributes: str | int | float) -> Span:
    """Start a span below the current one; one that records nothing outside any trace. The caller ends it."""
    parent = current_span()
    if _tracer is None or parent.context is None:
        return NO_SPAN
    return _tracer.start(name, kind, parent, attributes)


def span(
    name: str, kind: SpanKind = SpanKind.INTERNAL, **attributes: str | int | float
) -> AbstractContextManager[Span]:
    """A span below the current one, which is the current one within. It fails with the exception that ends it."""
    if _tracer is None or (parent := current_span()).context is None:
        return nullcontext(NO_SPAN)
    return ending(_tracer.start(name, kind, parent, attributes))


@contextmanager
def ending(span: Span) -> Iterator[Span]:
    """Make a span the current one, and end it afterwards.

    An exception is recorded by the name of its class alone. That a call was cancelled or handed over is no failure.
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
    """The context in which a stage runs: its span, and `timed`."""
    with span(f"stage {stage}"), timed:
        yield


@contextmanager
def exporting(service: str, environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """Export the spans of this process, where the environment asks for it. Services of one process share the exporter.

    Nothing here fails: where spans cannot be exported, one warning says why.
    """
    global _tracer, _users
    if not _users and _is_wanted(environ):
        _tracer = _opened(service, environ)
    _users += 1
    try:
        yield
    finally:
        _users -= 1
        if not _users and _tracer is not None:
            _tracer.close()
            _tracer = None


def _is_wanted(environ: Mapping[str, str]) -> bool:
    exporter = environ.get(_EXPORTER, "").strip().lower()
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or exporter == "none":
        return False
    return bool(exporter) or any(environ.get(name) for name in _ENDPOINTS)


def _opened(service: str, environ: Mapping[str, str]) -> Tracer | None:
    """The exporter; None, with a warning, where there cannot be one."""
    exporter = environ.get(_EXPORTER, "").strip().lower()
    if exporter not in ("", "otlp"):
        _log.warning("no traces are exported", variable=_EXPORTER, value=exporter, supported="otlp,none")
        return None
    name = next((each for each in _PROTOCOLS if environ.get(each)), "")
    if name and environ[name].strip().lower() != "grpc":
        _log.warning("no traces are exported", variable=name, value=environ[name], supported="grpc")
        return None
    try:
        # OpenTelemetry takes 0.2 s and 20 MB, and is an optional extra.
        from common.otlp import OtlpTracer
    except ModuleNotFoundError as error:
        _log.warning(
            "no traces are exported",
            missing=error.name,
            fix="pip install 'diffusion-fleet[tracing]'",
            or_unset=[each for each in (*_ENDPOINTS, _EXPORTER) if environ.get(each)],
        )
        return None
    try:
        return OtlpTracer(service)
    except Exception as error:  # noqa: BLE001  (the SDK has exceptions of its own for wrong variables)
        _log.warning("no traces are exported: an OTEL_ variable is wrong", error=error)
        return None
