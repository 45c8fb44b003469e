"""The request, model, stage and attempt that log lines name: context variables of a task or thread.

They are set where a coordinator drives a request and where a worker serves a call, so that no log call passes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

from common.trace_context import current_span

REQUEST_ID_KEY = "fleet-request-id"
"""Metadata key of the id of the request that a call works for."""
ATTEMPT_KEY = "fleet-attempt"
"""Metadata key of the number of the attempt at a stage, from 1."""

SHORTEST_HIDDEN = 8
"""Characters of the shortest text that is hidden. Hiding `a` would destroy every line."""

_HIDDEN = "[hidden]"
_MOST_DIGITS = 9


@dataclass(frozen=True, slots=True)
class LogContext:
    """What the log lines of a task or thread are about. Empty texts and the attempt 0 are left out of lines."""

    request_id: str = ""
    model: str = ""
    stage: str = ""
    """The service of the pipeline stage, such as denoising."""
    attempt: int = 0
    """Number of the call of a worker for this stage of the request, from 1."""
    private: tuple[str, ...] = field(default=(), repr=False)
    """Texts that no line may hold, such as the prompt, which an error of a library may quote."""


_NOTHING = LogContext()
_current: ContextVar[LogContext] = ContextVar("fleet_log_context", default=_NOTHING)


def current_log_context() -> LogContext:
    """The context of this task or thread."""
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
    """Set some fields of the log context within, and in tasks started there; None leaves a field as it is."""
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

    The context is never reset: gRPC serves every call in a task with a context of its own.
    """
    attempt = str(metadata.get(ATTEMPT_KEY, ""))
    is_number = attempt.isascii() and attempt.isdecimal() and len(attempt) <= _MOST_DIGITS
    request_id = str(metadata.get(REQUEST_ID_KEY, ""))
    _current.set(LogContext(request_id, model, stage, int(attempt) if is_number else 0))


def hide_texts(texts: Iterable[str]) -> None:
    """Keep texts out of the log lines of this call, whose task has a context of its own."""
    _current.set(replace(_current.get(), private=_with_escapes(texts)))


def without_hidden(text: str) -> str:
    """The text without the private texts of this task or thread."""
    for private in _current.get().private:
        text = text.replace(private, _HIDDEN)
    return text


def outgoing_attempt() -> Iterable[tuple[str, str]]:
    """The metadata by which a called worker names the attempt in its log; none outside an attempt."""
    attempt = _current.get().attempt
    return ((ATTEMPT_KEY, str(attempt)),) if attempt else ()


def context_fields() -> dict[str, str | int]:
    """The fields of the log context that are set, with the trace id, in the order of a log line."""
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
    """The texts that are long enough to hide, as they are and as repr() quotes them, longest first."""
    forms = {form for text in texts for form in (text.strip(), repr(text)[1:-1], repr(text.strip())[1:-1])}
    return tuple(sorted((form for form in forms if len(form) >= SHORTEST_HIDDEN), key=len, reverse=True))
