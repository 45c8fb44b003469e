"""Context variables of log lines: request, model, stage and attempt of the current task or thread.

Coordinators set them per request and workers per call, so that log calls need not pass them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from common.trace_context import current_span

REQUEST_ID_KEY = "fleet-request-id"
"""Metadata key of a call: id of the request."""
ATTEMPT_KEY = "fleet-attempt"
"""Metadata key of a call: number of the attempt at the stage, from 1."""

SHORTEST_HIDDEN = 8
"""Minimum length of a hidden text in characters. Hiding a prompt `a` would make every log line unreadable."""

_HIDDEN = "[hidden]"
_MOST_DIGITS = 9


@dataclass(frozen=True, slots=True)
class LogContext:
    """Fields that are added to the log lines of a task or thread. Empty strings and attempt 0 are omitted."""

    request_id: str = ""
    model: str = ""
    stage: str = ""
    """Stage service, such as denoising."""
    attempt: int = 0
    """Number of the attempt at this stage of the request, from 1."""
    private: tuple[str, ...] = field(default=(), repr=False)
    """Texts to remove from log lines, such as the prompt, which errors of libraries may quote."""


_NOTHING = LogContext()
_current: ContextVar[LogContext] = ContextVar("fleet_log_context", default=_NOTHING)


def current_log_context() -> LogContext:
    """Return the log context of this task or thread."""
    return _current.get()


@contextmanager
def log_scope(
    *,
    request_id: str | None = None,
    model: str | None = None,
    stage: str | None = None,
    attempt: int | None = None,
    private: Iterable[str] | None = None,
) -> Iterator[None]:
    """Set fields of the log context in this block and in tasks that it starts. None leaves a field unchanged."""
    own = _current.get()
    changed = LogContext(
        own.request_id if request_id is None else request_id,
        own.model if model is None else model,
        own.stage if stage is None else stage,
        own.attempt if attempt is None else attempt,
        own.private if private is None else _with_escapes(private),
    )
    token = _current.set(changed)
    try:
        yield
    finally:
        _current.reset(token)


def enter_call(metadata: Mapping[str, str | bytes], *, model: str, stage: str) -> None:
    """Set the log context of a stage call from the call's metadata.

    There is no reset: gRPC serves every call in a separate task with a copy of the context.
    """
    attempt = str(metadata.get(ATTEMPT_KEY, ""))
    is_number = attempt.isascii() and attempt.isdecimal() and len(attempt) <= _MOST_DIGITS
    request_id = str(metadata.get(REQUEST_ID_KEY, ""))
    _current.set(LogContext(request_id, model, stage, int(attempt) if is_number else 0))


def hide_texts(texts: Iterable[str]) -> None:
    """Remove texts from the log lines of this call. There is no reset: every call has a separate task."""
    _current.set(replace(_current.get(), private=_with_escapes(texts)))


def without_hidden(text: str) -> str:
    """Replace the private texts of this task or thread in a text."""
    for private in _current.get().private:
        text = text.replace(private, _HIDDEN)
    return text


def outgoing_attempt() -> Iterable[tuple[str, str]]:
    """Return the metadata with the number of the attempt, for the worker's log; empty outside an attempt."""
    attempt = _current.get().attempt
    return ((ATTEMPT_KEY, str(attempt)),) if attempt else ()


def context_fields() -> dict[str, str | int]:
    """Return the non-empty fields of the log context and the trace id, in the order of a log line."""
    own, span = _current.get(), current_span().context
    fields: dict[str, str | int] = {
        "request_id": own.request_id,
        "trace_id": "" if span is None else span.trace_id,
        "model": own.model,
        "stage": own.stage,
        "attempt": own.attempt,
    }
    return {name: value for name, value in fields.items() if value}


def _with_escapes(texts: Iterable[str]) -> tuple[str, ...]:
    """Return the texts that are long enough to hide, plain and as repr() escapes them, longest first."""
    forms = {form for text in texts for form in (text.strip(), repr(text)[1:-1], repr(text.strip())[1:-1])}
    return tuple(sorted((form for form in forms if len(form) >= SHORTEST_HIDDEN), key=len, reverse=True))
