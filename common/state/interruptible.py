"""Connections to the store that end a cancelled command at once."""

from __future__ import annotations

import asyncio
from functools import cache
from typing import Any, cast

from common.state.redis_client import Redis


def make_interruptible(redis: Redis) -> None:
    """Make future connections of a client end a cancelled command at once.

    redis-py sends a command within asyncio.wait_for(), which before Python 3.12 drops a cancellation that arrives
    together with the end of the sending. The command would then wait for its reply until the socket timeout, or be
    repeated after an error.
    """
    pool = cast(Any, redis).connection_pool
    pool.connection_class = _interruptible(pool.connection_class)


@cache
def _interruptible(kind: type) -> type:
    return type(f"Interruptible{kind.__name__}", (_Interruptible, kind), {})


class _Interruptible:
    """Mixin for the connection classes of redis-py."""

    async def send_packed_command(self, *args: Any, **options: Any) -> None:
        """Send a command. Raises CancelledError if redis-py dropped the cancellation or raised another error."""
        task = asyncio.current_task()
        asked = task.cancelling() if task else 0
        try:
            await cast(Any, super()).send_packed_command(*args, **options)
        finally:
            if task and task.cancelling() > asked:
                # Without a reader of the reply, the connection cannot be used for another command.
                await cast(Any, self).disconnect(nowait=True)
                raise asyncio.CancelledError
