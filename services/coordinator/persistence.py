"""Store operations that are repeated until the store answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from common.errors import Unavailable

_RETRY_SECONDS = 0.2
LONGEST_RETRY_SECONDS = 2.0

T = TypeVar("T")

_log = logging.getLogger(__name__)


async def persist(what: str, attempt: Callable[[], Awaitable[T]]) -> T:
    """Try until the store is available. `what` begins the log line of each failed attempt."""
    pause = _RETRY_SECONDS
    while True:
        try:
            return await attempt()
        except Unavailable as error:
            _log.warning("%s, and waits for the store: %s", what, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_RETRY_SECONDS)
