"""W3C trace contexts are parsed and passed on without OpenTelemetry."""

from __future__ import annotations

import asyncio
import contextvars

import pytest

from common import tracing
from common.errors import Cancelled, HandedOver, Unavailable
from common.trace_context import (
    NO_SPAN,
    Span,
    TraceContext,
    current_span,
    current_trace_id,
    entered,
    outgoing,
    parse_traceparent,
    receive,
)

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize("text", [PARENT, f"cc-{TRACE}-{SPAN}-01-more", f"01-{TRACE}-{SPAN}-01"])
def test_a_valid_traceparent_is_parsed(text: str) -> None:
    context = parse_traceparent(text, "vendor=1")
    assert context == TraceContext(TRACE, SPAN, 1, "vendor=1")
    assert context.sampled
    assert context.traceparent == PARENT


@pytest.mark.parametrize(
    "text",
    [
        "",
        "00",
        PARENT.upper(),
        PARENT + "-more",
        PARENT + "x",
        f"cc-{TRACE}-{SPAN}-01x",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[1:]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-0",
        f" {PARENT}",
    ],
)
def test_an_invalid_traceparent_is_ignored(text: str) -> None:
    assert parse_traceparent(text) is None


@pytest.mark.parametrize("state", ["x" * 513, "a=\n", "a=é"])
def test_a_tracestate_that_cannot_be_passed_on_is_dropped(state: str) -> None:
    context = parse_traceparent(PARENT, state)
    assert context is not None
    assert context.state == ""


def test_flags_are_passed_on() -> None:
    context = parse_traceparent(f"00-{TRACE}-{SPAN}-02")
    assert context is not None
    assert not context.sampled
    assert context.traceparent.endswith("-02")


def _received(*metadata: tuple[str, str | bytes]) -> tuple[str | None, tuple[tuple[str, str], ...]]:
    def within() -> tuple[str | None, tuple[tuple[str, str], ...]]:
        receive(metadata)
        return current_trace_id(), outgoing()

    return contextvars.copy_context().run(within)


def test_metadata_is_passed_on_unchanged() -> None:
    metadata = (("traceparent", PARENT), ("tracestate", "vendor=1"))
    assert _received(("other", "x"), *metadata) == (TRACE, metadata)
    assert _received(("traceparent", PARENT)) == (TRACE, (("traceparent", PARENT),))
    assert _received(("traceparent", "wrong"), ("tracestate", "vendor=1")) == (None, ())
    assert _received(("traceparent", PARENT.encode())) == (None, ())
    assert _received() == (None, ())


def test_the_current_span_is_the_span_of_the_block() -> None:
    assert current_trace_id() is None
    outer, inner = Span(TraceContext(TRACE, SPAN)), Span(TraceContext("a" * 32, "b" * 16))
    with entered(outer):
        with entered(inner):
            assert current_trace_id() == "a" * 32
        assert current_span() is outer
    assert current_span() is NO_SPAN


def test_spans_without_an_exporter_record_nothing_and_pass_the_context_on() -> None:
    assert tracing.tracer() is None
    with entered(Span(TraceContext(TRACE, SPAN))), tracing.span("a", number=1) as span:
        span.event("b", number=2)
        span.set(number=3)
        span.fail("INTERNAL")
        span.end()
        assert outgoing() == (("traceparent", PARENT),)
    assert tracing.start_span("c") is NO_SPAN


class RecordingSpan(Span):
    """A span that records its attributes, its failure and its end."""

    def __init__(self) -> None:
        super().__init__(TraceContext(TRACE, SPAN))
        self.notes: list[str] = []

    def set(self, **attributes: str | int | float) -> None:
        self.notes += attributes

    def fail(self, what: str) -> None:
        self.notes.append(what)

    def end(self) -> None:
        self.notes.append("end")


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (ValueError("a secret"), "ValueError"),
        (Unavailable("the worker is lost"), "Unavailable"),
        (HandedOver("leaves"), "handed_over"),
        (Cancelled("left"), "cancelled"),
        (asyncio.CancelledError(), "cancelled"),
    ],
)
def test_a_span_records_the_class_of_its_error_and_ends(error: BaseException, note: str) -> None:
    span = RecordingSpan()
    with pytest.raises(type(error)), tracing.ending(span):
        raise error
    assert span.notes == [note, "end"]
    assert current_span() is NO_SPAN
