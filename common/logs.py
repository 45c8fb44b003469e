"""Structured logging: `_log.warning("heartbeat failed", worker=worker_id, error=error)`.

The event is a short, constant string, followed by key=value pairs. common.log_context adds request, trace, model, stage
and attempt; common.log_format defines the formats.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

from common.log_format import Event, LogFormat, LogFormatter
from common.log_repeats import RepeatLimitingHandler

_CALLER = 3  # stack frames from Logger.log() to the call site
_POLLING = "grpc._cython.cygrpc"  # logger with a DEBUG record for each poll of an event loop, 10 per second


class EventLogger:
    """Logs events with key=value pairs, through the standard logger of the given name."""

    __slots__ = ("_logger",)

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, /, **pairs: object) -> None:
        """Log a detail for developers."""
        self._write(logging.DEBUG, event, pairs)

    def info(self, event: str, /, **pairs: object) -> None:
        """Log a change of state."""
        self._write(logging.INFO, event, pairs)

    def warning(self, event: str, /, **pairs: object) -> None:
        """Log a problem from which the fleet recovers."""
        self._write(logging.WARNING, event, pairs)

    def error(self, event: str, /, *, exc_info: BaseException | None = None, **pairs: object) -> None:
        """Log a problem that requires action of an operator, with the traceback of `exc_info`."""
        self._write(logging.ERROR, event, pairs, exc_info)

    def exception(self, event: str, /, **pairs: object) -> None:
        """Log an error with the traceback of the current exception."""
        self._write(logging.ERROR, event, pairs, sys.exc_info()[1])

    def critical(self, event: str, /, *, exc_info: BaseException | None = None, **pairs: object) -> None:
        """Log the reason why the process exits, with the traceback of `exc_info`."""
        self._write(logging.CRITICAL, event, pairs, exc_info)

    def announce(self, event: str, /, **pairs: object) -> None:
        """Write an INFO record regardless of the configured log level, because other programs wait for it."""
        name, line = self._logger.name, 0
        self._logger.handle(self._logger.makeRecord(name, logging.INFO, "", line, Event(event, pairs), (), None))

    def _write(self, level: int, event: str, pairs: dict[str, object], exc_info: BaseException | None = None) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, Event(event, pairs), exc_info=exc_info, stacklevel=_CALLER)


def get_logger(name: str) -> EventLogger:
    """Return the logger of a module, by its `__name__`."""
    return EventLogger(name)


class _LibraryLogger(logging.Logger):
    """Logger of a library, without its console handlers, that propagates records to the root logger."""

    _is_redirected = False
    _propagate = True

    @property
    def propagate(self) -> bool:
        """Whether records are passed to the root logger's handlers."""
        return self._propagate or self._is_redirected

    @propagate.setter
    def propagate(self, value: bool) -> None:
        self._propagate = value

    def addHandler(self, handler: logging.Handler) -> None:  # noqa: N802 -- The name in logging.
        """Add a handler, unless it writes to the console."""
        if _is_console(handler):
            self._is_redirected = True
        else:
            super().addHandler(handler)


def _is_console(handler: logging.Handler) -> bool:
    streams = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return isinstance(handler, logging.StreamHandler) and handler.stream in streams


def redirect_libraries() -> None:
    """Route the records of libraries through the root logger, including libraries imported later.

    torch, transformers and diffusers add console handlers and disable propagation.
    """
    logging.captureWarnings(True)
    logging.getLogger(_POLLING).setLevel(logging.INFO)
    logging.setLoggerClass(_LibraryLogger)
    for each in list(logging.root.manager.loggerDict.values()):
        if not isinstance(each, logging.Logger):
            continue
        if consoles := [handler for handler in each.handlers if _is_console(handler)]:
            for handler in consoles:
                each.removeHandler(handler)
            each.propagate = True


def setup_logging(service: str, *, level: str = "INFO", form: LogFormat = "text", stream: TextIO | None = None) -> None:
    """Write this process's log records to `stream` (default: stderr). Replaces the previous configuration."""
    handler = RepeatLimitingHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(LogFormatter(service, form))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    redirect_libraries()


def writes_json() -> bool:
    """Return whether this process logs JSON."""
    formatters: list[Any] = [handler.formatter for handler in logging.getLogger().handlers]
    return any(isinstance(each, LogFormatter) and each.form == "json" for each in formatters)
