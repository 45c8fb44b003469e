"""Slots: the right to run one request on one worker of a service, handed out in order of priority, deadline, arrival.

The store hands a slot that is given back straight to who is next, so that nobody polls. A claim still asks again now
and then, which heals lost messages, dead workers and dead coordinators.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass

from redis.asyncio import Redis

from common.errors import Unavailable
from common.state.connection import run_script
from common.state.presence import Presence
from fleet.v1 import worker_pb2

_ASK_AGAIN_SECONDS = 1.0


@dataclass(frozen=True)
class Slot:
    """The right to run a request on `worker`, until it is released."""

    ticket: str
    place: str
    worker: worker_pb2.WorkerInfo


class Slots:
    """Claims and releases slots for one coordinator, whose presence must have been started."""

    def __init__(self, redis: Redis, presence: Presence, *, ask_again_seconds: float = _ASK_AGAIN_SECONDS) -> None:
        self._redis = redis
        self._owner = presence.owner
        self._ask_again_seconds = ask_again_seconds
        self._waiting: dict[str, asyncio.Future[bytes]] = {}
        self._numbers = itertools.count()
        presence.on_grant = self._granted

    async def claim(
        self,
        model: str,
        service: str,
        request_id: str,
        *,
        priority: int = 0,
        deadline_ms: int = 0,
        patience_seconds: float | None = None,
    ) -> Slot:
        """Wait for a slot; when it is free at once, that is one round trip.

        `deadline_ms`, since the epoch, only ranks; 0 is none. Raises Unavailable when for `patience_seconds` there was
        no live worker at all (None waits for ever), or when the store is away. An abandoned claim leaves the queue.
        """
        ticket = f"{request_id}/{self._owner}/{next(self._numbers)}"
        place = f"{model}/{service}"
        granted: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = granted
        try:
            info = await self._wait(ticket, place, granted, (str(priority), str(deadline_ms)), patience_seconds)
            return Slot(ticket, place, worker_pb2.WorkerInfo.FromString(info))
        except BaseException:
            await asyncio.shield(self._release(ticket, place))
            raise
        finally:
            del self._waiting[ticket]

    async def _wait(
        self, ticket: str, place: str, granted: asyncio.Future[bytes], rank: tuple[str, str], patience: float | None
    ) -> bytes:
        loop = asyncio.get_running_loop()
        last_seen = loop.time()
        while True:
            reply = await run_script(self._redis, "claim", ticket, place, self._owner, *rank)
            if reply[0] == b"granted":
                return bytes(reply[1])
            if int(reply[1]):
                last_seen = loop.time()
            elif patience is not None and loop.time() - last_seen >= patience:
                raise Unavailable(f"no worker serves {place}, and none came within {patience:g} s")
            await asyncio.wait({granted}, timeout=self._ask_again_seconds)
            if granted.done():
                return granted.result()

    async def release(self, slot: Slot) -> None:
        """Give a slot back; it goes to who is next. Raises Unavailable when the store is away."""
        await self._release(slot.ticket, slot.place)

    async def _release(self, ticket: str, place: str) -> None:
        await run_script(self._redis, "release", ticket, place)

    def _granted(self, ticket: str, info: bytes) -> None:
        waiting = self._waiting.get(ticket)
        if waiting is not None and not waiting.done():
            waiting.set_result(info)
