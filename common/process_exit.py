"""Ends a process that cannot unwind: one of its threads waits for a device or a peer that does not answer."""

from __future__ import annotations

import logging
import os
import signal
from typing import NoReturn

from common.logs import get_logger

TEMPORARY_FAILURE = 75
"""Exit code of a process that is worth restarting: EX_TEMPFAIL."""

_LAST_LINE_SECONDS = 2.0

_log = get_logger(__name__)


def exit_at_once(reason: str, code: int = TEMPORARY_FAILURE) -> NoReturn:
    """Log the reason, flush the logs, and end the process without waiting for its threads or its event loop."""
    # SIGALRM ends the process even where standard error, or the log's lock, is held by a thread that is stuck.
    signal.setitimer(signal.ITIMER_REAL, _LAST_LINE_SECONDS)
    _log.critical("process ends at once", reason=reason, exit_code=code)
    logging.shutdown()
    os._exit(code)
