"""The trace that this task's work belongs to, for exemplars and log lines."""

from __future__ import annotations

from contextvars import ContextVar

TRACE_ID: ContextVar[str | None] = ContextVar("fleet_trace_id", default=None)
"""The trace id of the call that is served, as 32 hexadecimal digits; None where no trace is recorded."""


def current_trace_id() -> str | None:
    """The trace id of the current context."""
    return TRACE_ID.get()
