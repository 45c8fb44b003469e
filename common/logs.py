"""Structured log lines: `_log.warning("heartbeat failed", worker=worker_id, error=error)`.

The event is a short text that is the same each time, followed by key=value pairs. Request, trace, model, stage and
attempt come from the context: see common.log_context. Formats: see common.log_format.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

from common.log_format import Event, LogFormat, LogFormatter
from common.log_repeats import RepeatLimitingHandler

_CALLER = 3  # stack frames from Logger.log() to the call site
_POLLING = "grpc._cython.cygrpc"  # writes a DEBUG line at each poll of an event loop, ten a second


class EventLogger:
    """Logs events with pairs, through the standard logger of a name."""

    __slots__ = ("_logger",)

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def debug(self, event: str, /, **pairs: object) -> None:
        """Log what only a developer reads."""
        self._write(logging.DEBUG, event, pairs)

    def info(self, event: str, /, **pairs: object) -> None:
        """Log a change of state."""
        self._write(logging.INFO, event, pairs)

    def warning(self, event: str, /, **pairs: object) -> None:
        """Log a disturbance that the fleet recovers from."""
        self._write(logging.WARNING, event, pairs)

    def error(self, event: str, /, *, exc_info: BaseException | None = None, **pairs: object) -> None:
        """Log what an operator must act on; with the traceback of `exc_info`."""
        self._write(logging.ERROR, event, pairs, exc_info)

    def exception(self, event: str, /, **pairs: object) -> None:
        """Log an error with the traceback of the exception that is being handled."""
        self._write(logging.ERROR, event, pairs, sys.exc_info()[1])

    def critical(self, event: str, /, *, exc_info: BaseException | None = None, **pairs: object) -> None:
        """Log why the process ends; with the traceback of `exc_info`."""
        self._write(logging.CRITICAL, event, pairs, exc_info)

    def announce(self, event: str, /, **pairs: object) -> None:
        """Write an INFO line at every log level: other programs wait for it."""
        name, line = self._logger.name, 0
        self._logger.handle(self._logger.makeRecord(name, logging.INFO, "", line, Event(event, pairs), (), None))

    def _write(self, level: int, event: str, pairs: dict[str, object], exc_info: BaseException | None = None) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, Event(event, pairs), exc_info=exc_info, stacklevel=_CALLER)


def get_logger(name: str) -> EventLogger:
    """The logger of a module, by its `__name__`."""
    return EventLogger(name)


class _LibraryLogger(logging.Logger):
    """A logger whose package may not write to the console by itself: its records go to the root logger's handler."""

    _is_redirected = False
    _propagate = True

    @property
    def propagate(self) -> bool:
        """Whether the root logger's handler gets the records."""
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
    """Have libraries log through the root logger: those imported already, such as torch, and those imported later.

    transformers and diffusers, like torch, add handlers of their own to the console and switch propagation off.
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
    """Send this process's log records to `stream` (stderr), one line each; replaces what was set before."""
    handler = RepeatLimitingHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(LogFormatter(service, form))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    redirect_libraries()


def writes_json() -> bool:
    """Whether this process's log is set up to be JSON."""
    formatters: list[Any] = [handler.formatter for handler in logging.getLogger().handlers]
    return any(isinstance(each, LogFormatter) and each.form == "json" for each in formatters)
