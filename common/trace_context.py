"""W3C trace contexts, and the current span of a task or thread. Does not import OpenTelemetry.

The context is propagated in the gRPC metadata `traceparent` and `tracestate`, even if this process exports no spans.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum

TRACEPARENT_KEY = "traceparent"
TRACESTATE_KEY = "tracestate"

_SAMPLED = 1
_MOST_STATE = 512  # maximum characters of a propagated tracestate; W3C recommends at least 512
_TRACEPARENT = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
)
_STATE = re.compile(r"[ -~]*")


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Trace and span id (32 and 16 lowercase hexadecimal digits), trace flags, unparsed tracestate."""

    trace_id: str
    span_id: str
    flags: int = _SAMPLED
    state: str = ""

    @property
    def sampled(self) -> bool:
        """Whether the sampled flag is set."""
        return bool(self.flags & _SAMPLED)

    @property
    def traceparent(self) -> str:
        """Value of the metadata key `traceparent`."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"


def parse_traceparent(text: str, state: str = "") -> TraceContext | None:
    """Parse a traceparent and its tracestate. Returns None for a traceparent that is invalid by the W3C specification.

    Later versions may have further fields. A tracestate that is too long or not printable ASCII is dropped.
    """
    match = _TRACEPARENT.match(text)
    if match is None or match["version"] == "ff" or not int(match["trace"], 16) or not int(match["span"], 16):
        return None
    rest = text[match.end() :]
    if rest and (match["version"] == "00" or not rest.startswith("-")):
        return None
    if len(state) > _MOST_STATE or not _STATE.fullmatch(state):
        state = ""
    return TraceContext(match["trace"], match["span"], int(match["flags"], 16), state)


class SpanKind(Enum):
    """Span kind of OpenTelemetry."""

    INTERNAL = "INTERNAL"
    SERVER = "SERVER"
    CLIENT = "CLIENT"


class Span:
    """A span that records nothing. `context` is propagated to called processes; None outside a trace.

    Attributes are numbers, booleans and short names, never prompts or error messages.
    """

    __slots__ = ("context",)

    def __init__(self, context: TraceContext | None = None) -> None:
        self.context = context

    def event(self, name: str, **attributes: str | int | float) -> None:
        """Add an event with the current time."""

    def set(self, **attributes: str | int | float) -> None:
        """Set attributes."""

    def fail(self, what: str) -> None:
        """Mark the span as failed. `what` is a gRPC code or the name of an exception's class."""

    def end(self) -> None:
        """End the span; later calls have no effect."""


NO_SPAN = Span()
_current: ContextVar[Span] = ContextVar("fleet_span", default=NO_SPAN)


def current_span() -> Span:
    """Return the span of this task or thread."""
    return _current.get()


def current_trace_id() -> str | None:
    """Return the id of the current trace, as 32 hexadecimal digits; None if the trace is not sampled."""
    context = _current.get().context
    return context.trace_id if context is not None and context.sampled else None


@contextmanager
def entered(span: Span) -> Iterator[Span]:
    """Make a span the current span of this task or thread, and of tasks that it starts, within the block."""
    token = _current.set(span)
    try:
        yield span
    finally:
        _current.reset(token)


def make_current(span: Span) -> None:
    """Make a span the current span for the rest of a gRPC call.

    The span is also current in interceptors that end after the handler. There is no reset: each call is a separate task
    with a copy of the context.
    """
    _current.set(span)


def receive(metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
    """Make the span in a gRPC call's metadata the current span of the call's task."""
    parent, state = "", ""
    for key, value in metadata or ():
        if key == TRACEPARENT_KEY and isinstance(value, str):
            parent = value
        elif key == TRACESTATE_KEY and isinstance(value, str):
            state = value
    if parent and (context := parse_traceparent(parent, state)) is not None:
        make_current(Span(context))


def outgoing() -> tuple[tuple[str, str], ...]:
    """Return the gRPC metadata that propagates the current span to the called process."""
    context = _current.get().context
    if context is None:
        return ()
    state = ((TRACESTATE_KEY, context.state),) if context.state else ()
    return ((TRACEPARENT_KEY, context.traceparent), *state)
