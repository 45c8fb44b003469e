"""Retries store operations until the store is available."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from common.errors import Unavailable
from common.logs import get_logger

_RETRY_SECONDS = 0.2
LONGEST_RETRY_SECONDS = 2.0

T = TypeVar("T")

_log = get_logger(__name__)


async def persist(what: str, attempt: Callable[[], Awaitable[T]]) -> T:
    """Retry `attempt` until the store is available. `what` names the operation in log lines."""
    pause = _RETRY_SECONDS
    while True:
        try:
            return await attempt()
        except Unavailable as error:
            _log.warning("request store is unavailable, retrying", operation=what, error=error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_RETRY_SECONDS)
