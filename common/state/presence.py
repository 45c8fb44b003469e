"""Heartbeat of a coordinator, and its pub/sub channel for messages of the store.

While the heartbeat is valid, the coordinator's worker slots and queued claims are valid. The channel delivers grants of
worker slots and cancellations of requests. A message that is lost with a connection is recovered: a grant by the next
claim operation, a cancellation by the next take_over operation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from common.errors import InternalError, Unavailable
from common.logs import get_logger
from common.state.connection import BLOCK_SECONDS, PREFIX, Arguments, cancellation_kept, run_script
from common.state.redis_client import Redis, RedisError

HEARTBEAT_SECONDS = 2.0
TTL_SECONDS = 6.0
_BACKOFF_SECONDS = 0.5
_LEAVE_SECONDS = 2.0

_log = get_logger(__name__)


def _ignore(*_: object) -> None:
    return None


async def run_on_leaving(redis: Redis, operation: str, arguments: Arguments) -> None:
    """Run an operation of a process that shuts down, with a short timeout. Raises Unavailable.

    The timeout is short because the process has calls to finish within its grace period, and because the store reaches
    the same state once the heartbeat expires.
    """
    try:
        async with asyncio.timeout(_LEAVE_SECONDS):
            await run_script(redis, operation, arguments)
    except TimeoutError:
        raise Unavailable(f"the request store has not responded within {_LEAVE_SECONDS:g} s") from None


class Presence:
    """Sends heartbeats of `owner`. Calls on_grant(ticket, info) and on_cancel(request_id) on the event loop."""

    def __init__(
        self,
        redis: Redis,
        owner: str,
        *,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        ttl_seconds: float = TTL_SECONDS,
    ) -> None:
        self.owner = owner
        self.on_grant: Callable[[str, bytes], None] = _ignore
        self.on_cancel: Callable[[str], None] = _ignore
        self._redis = redis
        self._heartbeat_seconds = heartbeat_seconds
        self._ttl = int(ttl_seconds * 1_000)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Send the first heartbeat, start the heartbeat task and subscribe to the channel. Raises Unavailable."""
        await self._send_heartbeat()
        subscribed = asyncio.Event()
        self._tasks = [asyncio.create_task(self._send_heartbeats()), asyncio.create_task(self._listen(subscribed))]
        await subscribed.wait()

    async def stop(self) -> None:
        """Stop heartbeats. The worker slots and queued claims of the coordinator are released."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        try:
            await run_on_leaving(self._redis, "resign", {"owner": self.owner})
        except Unavailable as error:
            _log.warning("shutdown not announced to the request store", error=error)

    async def _send_heartbeat(self) -> None:
        await run_script(self._redis, "beat", {"owner": self.owner, "lasts": self._ttl})

    async def _send_heartbeats(self) -> None:
        while True:
            await asyncio.sleep(self._heartbeat_seconds)
            try:
                await self._send_heartbeat()
            except Unavailable as error:
                _log.warning("heartbeat failed", error=error)
            except InternalError:
                # Continue: if heartbeats stopped, other coordinators would take over the requests of this coordinator.
                _log.exception("heartbeat failed")

    async def _listen(self, subscribed: asyncio.Event) -> None:
        while True:
            try:
                async with self._redis.pubsub(ignore_subscribe_messages=True) as channel:
                    with cancellation_kept():
                        await channel.subscribe(f"{PREFIX}coordinator:{self.owner}")
                    subscribed.set()
                    while True:
                        message = await channel.get_message(timeout=BLOCK_SECONDS)
                        if message is not None:
                            self._receive(message["data"])
            except (RedisError, OSError) as error:
                _log.warning("channel to the request store lost", error=error)
                await asyncio.sleep(_BACKOFF_SECONDS)

    def _receive(self, data: bytes) -> None:
        kind, _, rest = data.partition(b"\n")
        if kind == b"grant":
            ticket, _, info = rest.partition(b"\n")
            self.on_grant(ticket.decode(), info)
        elif kind == b"cancel":
            self.on_cancel(rest.decode())
