"""The request store that a command was given."""

from __future__ import annotations

import asyncio

from common.state.connection import connect, ping


def check_store(url: str) -> None:
    """Refuse, before anything starts, what is no URL (InvalidInput) and a server that does not answer (Unavailable)."""
    asyncio.run(_check(url))


async def _check(url: str) -> None:
    redis = connect(url)
    try:
        await ping(redis)
    finally:
        await redis.aclose()
