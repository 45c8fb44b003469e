"""Spans, exported by OpenTelemetry where its environment variables ask for it, and otherwise free of cost and imports.

Traces are on where OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is set, or OTEL_TRACES_EXPORTER is
"otlp", unless OTEL_SDK_DISABLED is "true" or OTEL_TRACES_EXPORTER is "none". The SDK reads all other variables.
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


@dataclass(frozen=True)
class NotExported:
    """Why no spans are exported although variables ask for it, and what to do."""

    reason: str
    advice: str


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
    """Whether the variables ask for traces."""
    exporter = environ.get(EXPORTER, "").strip().lower()
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or exporter == "none":
        return False
    return bool(exporter) or any(environ.get(name) for name in ENDPOINTS)


def collector_url(environ: Mapping[str, str]) -> str:
    """The URL that spans are sent to, without a password."""
    return without_password(next((environ[name] for name in ENDPOINTS if environ.get(name)), _DEFAULT_ENDPOINT))


def load_exporter(service: str, environ: Mapping[str, str]) -> OtlpTracer | NotExported:
    """The exporter, where the variables ask for one; the reason why there cannot be one."""
    exporter = environ.get(EXPORTER, "").strip().lower()
    if exporter not in ("", "otlp"):
        return NotExported(f"{EXPORTER} is {environ[EXPORTER]!r}", "otlp and none are supported")
    name = next((each for each in _PROTOCOLS if environ.get(each)), "")
    if name and environ[name].strip().lower() != "grpc":
        return NotExported(f"{name} is {environ[name]!r}", "grpc is supported")
    try:
        # OpenTelemetry takes 0.2 s and 20 MB, and is an optional extra.
        from common.otlp import OtlpTracer
    except ModuleNotFoundError as error:
        given = ", ".join(each for each in (*ENDPOINTS, EXPORTER) if environ.get(each))
        return NotExported(
            f"{error.name} is not installed", f"pip install 'diffusion-fleet[tracing]', or unset {given}"
        )
    try:
        return OtlpTracer(service, collector_url(environ))
    except Exception as error:  # noqa: BLE001  (the SDK has exceptions of its own for wrong variables)
        return NotExported(f"an OTEL_ variable is wrong: {without_password(str(error))}", "correct or unset it")


def _opened(service: str, environ: Mapping[str, str]) -> Tracer | None:
    """The exporter; None, with a warning, where there cannot be one."""
    found = load_exporter(service, environ)
    if isinstance(found, NotExported):
        _log.warning("no traces are exported", reason=found.reason, advice=found.advice)
        return None
    return found
