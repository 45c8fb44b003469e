"""Formats log records as single lines: text for terminals, or JSON objects for log collectors.

    2026-11-30T01:02:03.456Z INFO coordinator request finished request_id=0f3a stage=denoising attempt=2 state=SUCCEEDED
    {"time": "2026-11-30T01:02:03.456Z", "level": "INFO", "service": "coordinator", "event": "request finished", ...}

Line breaks, control characters and terminal escapes in values are escaped. Credentials in URLs and the prompt of the
request are redacted, including in records of libraries.

structlog is not used: before its configuration it writes to standard output, which contains the results of
`fleet generate`, and its text renderers do not escape terminal sequences. python-json-logger formats JSON only.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from typing import Any, Literal

from common.log_context import context_fields, without_hidden
from common.state.store_url import without_password

LogFormat = Literal["text", "json"]

RESERVED = ("time", "level", "service", "event", "logger", "exception")
"""Keys that the formatter sets. An underscore is appended to the key of a pair that has one of these names."""

OWN_LOGGERS = ("common", "configs", "models", "services")
"""Top-level packages whose records omit the field `logger`."""


class Event:
    """Message of a log record: an event and key=value pairs. Pairs with the value None are omitted."""

    __slots__ = ("name", "pairs")

    def __init__(self, name: str, pairs: Mapping[str, object]) -> None:
        self.name = name
        self.pairs = {f"{key}_" if key in RESERVED else key: value for key, value in pairs.items() if value is not None}

    def __str__(self) -> str:
        """Return the event as text, for handlers with another formatter."""
        return " ".join((_escaped(self.name), *(f"{key}={_text(value)}" for key, value in self.pairs.items())))


class LogFormatter(logging.Formatter):
    """Formats a record as one line. `service` is the name of this process in each line."""

    def __init__(self, service: str, form: LogFormat) -> None:
        super().__init__()
        self._service = service
        self.form = form

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record, without a trailing line break."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        moment = f"{seconds}.{int(record.msecs):03d}Z"
        event = record.msg if isinstance(record.msg, Event) else Event(record.getMessage(), {})
        fields: dict[str, object] = {**context_fields(), **event.pairs}
        if record.name.partition(".")[0] not in OWN_LOGGERS:
            fields["logger"] = record.name
        if record.exc_info or record.stack_info:
            fields["exception"] = self._traceback(record)
        fields = {name: _plain(value) for name, value in fields.items()}
        happened = _redacted(event.name)
        if self.form == "json":
            head = {"time": moment, "level": record.levelname, "service": self._service, "event": happened}
            return _escaped(json.dumps({**head, **fields}, ensure_ascii=False))
        columns = (moment, record.levelname, self._service, _escaped(happened))
        return " ".join((*columns, *(f"{name}={_text(value)}" for name, value in fields.items())))

    def _traceback(self, record: logging.LogRecord) -> str:
        parts = [self.formatException(record.exc_info)] if record.exc_info else []
        parts += [record.stack_info] if record.stack_info else []
        return "\n".join(parts)


def _plain(value: object) -> Any:
    """Convert a value to a JSON type, and redact credentials."""
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {_redacted(str(key)): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(each) for each in value]
    return _redacted(str(value))


def _redacted(text: str) -> str:
    """Redact prompts and the credentials of URLs in a text.

    URLs are redacted line by line, so that a traceback retains its other lines.
    """
    text = without_hidden(text)
    return "\n".join(map(without_password, text.split("\n"))) if "://" in text or "assword=" in text else text


def _text(value: object) -> str:
    """Format a value of a text line: unquoted if it is a single printable word, else as a JSON string."""
    match _plain(value):
        case bool(flag):
            return "true" if flag else "false"
        case float(number):
            return f"{number:g}"
        case list(items):
            word = ",".join(map(str, items))
        case dict(table):
            word = json.dumps(table, ensure_ascii=False)
        case other:
            word = str(other)
    is_word = word and word.isprintable() and not any(character in word for character in ' "=')
    return word if is_word else _escaped(json.dumps(word, ensure_ascii=False))


def _escaped(text: str) -> str:
    """Replace non-printable characters by JSON escapes, which do not change the value of JSON strings."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)
