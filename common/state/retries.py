"""Retries of store operations while the store is unavailable."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from common.errors import Unavailable
from common.logs import get_logger

_RETRY_SECONDS = 0.2
LONGEST_RETRY_SECONDS = 2.0
"""Maximum pause between two attempts."""

T = TypeVar("T")

_log = get_logger(__name__)


def _ignore() -> None:
    return None


async def retry_until_available(
    operation: str,
    attempt: Callable[[], Awaitable[T]],
    *,
    constant_seconds: float | None = None,
    on_retry: Callable[[], None] = _ignore,
    **pairs: object,
) -> T:
    """Call `attempt` until it does not raise Unavailable, and return its result.

    The pause starts at 0.2 s and doubles up to LONGEST_RETRY_SECONDS, or is `constant_seconds`. `on_retry` is called
    after each pause. `operation` and `pairs` are logged with each failed attempt.
    """
    pause = _RETRY_SECONDS if constant_seconds is None else constant_seconds
    while True:
        try:
            return await attempt()
        except Unavailable as error:
            _log.warning("request store is unavailable, retrying", operation=operation, error=error, **pairs)
        await asyncio.sleep(pause)
        on_retry()
        if constant_seconds is None:
            pause = min(2 * pause, LONGEST_RETRY_SECONDS)
