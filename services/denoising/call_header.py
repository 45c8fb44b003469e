"""The first message of a call from rank 0 to followers: its variant, and its log and trace context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Self

from common.log_context import current_log_context, log_scope
from common.stage import Call
from common.trace_context import Span, current_span, entered, parse_traceparent


class CallHeader(NamedTuple):
    """The fields of a CALL message, one per line."""

    request_id: str
    variant: str = ""
    model: str = ""
    attempt: str = ""
    traceparent: str = ""

    @classmethod
    def of(cls, call: Call) -> Self:
        """The header of a call in the current log and trace context."""
        own, trace = current_log_context(), current_span().context
        attempt = str(own.attempt or "")
        return cls(call.request_id, call.variant, own.model, attempt, "" if trace is None else trace.traceparent)

    def encoded(self) -> bytes:
        """The payload of the message."""
        return "\n".join(self).encode()

    @classmethod
    def decoded(cls, payload: bytes) -> Self:
        """Decode a payload. Escapes invalid UTF-8 instead of failing."""
        return cls(*payload.decode(errors="backslashreplace").split("\n")[: len(cls._fields)])

    @contextmanager
    def scope(self, stage: str) -> Iterator[None]:
        """Set the same log and trace context as on rank 0 while the call runs."""
        attempt = int(self.attempt) if self.attempt.isascii() and self.attempt.isdecimal() else 0
        trace = parse_traceparent(self.traceparent)
        with (
            log_scope(request_id=self.request_id, model=self.model, stage=stage, attempt=attempt),
            entered(Span(trace)),
        ):
            yield
