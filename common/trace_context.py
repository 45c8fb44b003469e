"""W3C trace contexts, and the current span of a task or thread. Imports nothing of OpenTelemetry.

A context comes in and goes out as the gRPC metadata `traceparent` and `tracestate`, also where this process exports no
spans: it passes on what it got.
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
_MOST_STATE = 512  # characters of a tracestate that are passed on, as W3C asks for; a longer one is dropped
_TRACEPARENT = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
)
_STATE = re.compile(r"[ -~]*")


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Ids of a span in lowercase hexadecimal (32 and 16 digits), the trace flags, and the tracestate as it came."""

    trace_id: str
    span_id: str
    flags: int = _SAMPLED
    state: str = ""

    @property
    def sampled(self) -> bool:
        """Whether the trace is recorded."""
        return bool(self.flags & _SAMPLED)

    @property
    def traceparent(self) -> str:
        """The value of the metadata of that name."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"


def parse_traceparent(text: str, state: str = "") -> TraceContext | None:
    """Read a traceparent and its tracestate; None for a traceparent that W3C calls invalid.

    A later version may have more fields after these four. A tracestate that is too long or not printable is dropped.
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
    """The role of a span's process, as OpenTelemetry distinguishes it."""

    INTERNAL = "INTERNAL"
    SERVER = "SERVER"
    CLIENT = "CLIENT"


class Span:
    """A span that records nothing. `context` is passed on to other processes; None outside any trace.

    Attributes are numbers, booleans and short names, never a prompt or the text of an error.
    """

    __slots__ = ("context",)

    def __init__(self, context: TraceContext | None = None) -> None:
        self.context = context

    def event(self, name: str, **attributes: str | int | float) -> None:
        """Record that something happened now."""

    def set(self, **attributes: str | int | float) -> None:
        """Set attributes."""

    def fail(self, what: str) -> None:
        """Mark the span as failed. `what` is a gRPC code or the name of an exception's class."""

    def end(self) -> None:
        """End the span; later calls have no effect."""


NO_SPAN = Span()
_current: ContextVar[Span] = ContextVar("fleet_span", default=NO_SPAN)


def current_span() -> Span:
    """The span of this task or thread."""
    return _current.get()


def current_trace_id() -> str | None:
    """The id of the current trace, as 32 hexadecimal digits; None where no trace is recorded."""
    context = _current.get().context
    return context.trace_id if context is not None and context.sampled else None


@contextmanager
def entered(span: Span) -> Iterator[Span]:
    """Make the span the current one of this task or thread, and of the tasks that it starts."""
    token = _current.set(span)
    try:
        yield span
    finally:
        _current.reset(token)


def make_current(span: Span) -> None:
    """Make the span the current one for the rest of a gRPC call. Interceptors that end after its handler see it.

    Never reset: each call is a task with a context of its own.
    """
    _current.set(span)


def receive(metadata: Iterable[tuple[str, str | bytes]] | None) -> None:
    """Make the span that a gRPC call's metadata names the current one of the call's task."""
    parent, state = "", ""
    for key, value in metadata or ():
        if key == TRACEPARENT_KEY and isinstance(value, str):
            parent = value
        elif key == TRACESTATE_KEY and isinstance(value, str):
            state = value
    if parent and (context := parse_traceparent(parent, state)) is not None:
        make_current(Span(context))


def outgoing() -> tuple[tuple[str, str], ...]:
    """The metadata that names the current span as the parent of what the called process does."""
    context = _current.get().context
    if context is None:
        return ()
    state = ((TRACESTATE_KEY, context.state),) if context.state else ()
    return ((TRACEPARENT_KEY, context.traceparent), *state)
