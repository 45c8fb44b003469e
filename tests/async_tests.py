"""Time limits for asyncio tests, and polling for conditions that trigger no event."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

HANG_SECONDS = 300.0
"""Time after which a wait of a test raises TimeoutError. No result depends on it, even on an overloaded host."""

_POLL_SECONDS = 0.005


def run_bounded(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test on a new event loop. Raises TimeoutError after HANG_SECONDS."""

    async def bounded() -> None:
        async with asyncio.timeout(HANG_SECONDS):
            await test()

    asyncio.run(bounded())


async def wait_until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    """Poll until the condition holds; the caller sets the time limit."""
    while True:
        result = condition()
        if result if isinstance(result, bool) else await result:
            return
        await asyncio.sleep(_POLL_SECONDS)


def poll(condition: Callable[[], bool], seconds: float, name: str) -> None:
    """Poll without an event loop. Raises TimeoutError after `seconds`; its message states the condition's `name`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {name}")
        time.sleep(_POLL_SECONDS)
