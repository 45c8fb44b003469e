"""Exits a process that cannot shut down, because a thread waits for an unresponsive device or peer."""

from __future__ import annotations

import logging
import os
import signal
from typing import NoReturn

from common.logs import get_logger

TEMPORARY_FAILURE = 75
"""Exit code of a process that should be restarted: EX_TEMPFAIL."""

_LAST_LINE_SECONDS = 2.0

_log = get_logger(__name__)


def exit_at_once(reason: str, code: int = TEMPORARY_FAILURE) -> NoReturn:
    """Log the reason, flush the logs and exit without waiting for threads or the event loop."""
    # SIGALRM ends the process even if a stuck thread holds the lock of standard error or of the log.
    signal.setitimer(signal.ITIMER_REAL, _LAST_LINE_SECONDS)
    _log.critical("process exits immediately", reason=reason, exit_code=code)
    logging.shutdown()
    os._exit(code)
