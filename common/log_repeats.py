"""Log handler that limits repeated records, such as one warning per retry of an unavailable store.

Of the records at WARNING or above with the same event and call site, the first 10 within 60 s are written. After the
60 s, or when the process exits, one record with `repeated=COUNT` replaces the others. Records below WARNING, such as
state changes of requests, are always written.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable
from contextvars import Context
from dataclasses import dataclass
from typing import TextIO

from common.log_context import current_log_context, log_scope
from common.log_format import Event

MOST_REPEATS = 10
WINDOW_SECONDS = 60.0
_MOST_WINDOWS = 1_024  # maximum number of windows; records of further events are written without a limit


@dataclass
class _Window:
    """Counts of the records of one event and call site since the first record."""

    first: logging.LogRecord
    ends: float
    private: tuple[str, ...]
    written: int = 0
    suppressed: int = 0


class RepeatLimitingHandler(logging.StreamHandler[TextIO]):
    """Writes records to a stream, with a limit for repeated records.

    Writes at most `most` records per event and call site within `seconds`. `clock` returns seconds.
    """

    def __init__(
        self,
        stream: TextIO,
        *,
        most: int = MOST_REPEATS,
        seconds: float = WINDOW_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(stream)
        self._most = most
        self._seconds = seconds
        self._clock = clock
        self._windows: dict[Hashable, _Window] = {}
        self._timer: threading.Timer | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write or count a record. logging holds the handler's lock."""
        if record.levelno < logging.WARNING:
            super().emit(record)
            return
        self._summarize(self._clock())
        if self._admits(record):
            super().emit(record)

    def close(self) -> None:
        """Write the pending counts and stop the timer."""
        assert self.lock is not None, "logging.Handler.__init__() creates it"
        with self.lock:
            self._summarize(float("inf"))
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
        super().close()

    def _admits(self, record: logging.LogRecord) -> bool:
        event = record.msg.name if isinstance(record.msg, Event) else str(record.msg)
        key = (record.name, record.levelno, record.pathname, record.lineno, event)
        window = self._windows.get(key)
        if window is None:
            if len(self._windows) >= _MOST_WINDOWS:
                return True
            window = self._windows[key] = _Window(record, self._clock() + self._seconds, current_log_context().private)
        if window.written < self._most:
            window.written += 1
            return True
        window.suppressed += 1
        if self._timer is None:
            self._start_timer(window.ends)
        return False

    def _summarize(self, now: float) -> None:
        """Remove windows that have ended by `now`, and write their counts."""
        for key, window in list(self._windows.items()):
            if window.ends <= now:
                del self._windows[key]
                if window.suppressed:
                    Context().run(self._write_summary, window)

    def _write_summary(self, window: _Window) -> None:
        """Write a count, without a request in the log context, because the records may be of several requests."""
        with log_scope(private=window.private):
            super().emit(_summary(window))

    def _start_timer(self, ends: float) -> None:
        self._timer = threading.Timer(max(0.0, ends - self._clock()), self._on_timer)
        self._timer.daemon = True
        self._timer.start()

    def _on_timer(self) -> None:
        assert self.lock is not None, "logging.Handler.__init__() creates it"
        with self.lock:
            if self._timer is not threading.current_thread():
                return  # The handler was closed meanwhile.
            self._timer = None
            self._summarize(self._clock())
            if waiting := [window.ends for window in self._windows.values() if window.suppressed]:
                self._start_timer(min(waiting))


def _summary(window: _Window) -> logging.LogRecord:
    first = window.first
    event = first.msg.name if isinstance(first.msg, Event) else first.getMessage()
    message = Event(event, {"repeated": window.suppressed})
    return logging.LogRecord(first.name, first.levelno, first.pathname, first.lineno, message, (), None, first.funcName)
