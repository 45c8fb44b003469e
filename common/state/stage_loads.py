"""Reads the load of services from the store, for autoscalers. The load includes the requests of all coordinators."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from dataclasses import dataclass

from common.scaling import StageLoad
from common.state.connection import PREFIX, Arguments, command, run_script
from common.state.records import timestamp_of
from common.state.redis_client import Redis
from fleet.v1 import generation_pb2

_REUSED = 50  # a result is reused for this multiple of the duration of its read


@dataclass(frozen=True)
class StageActivity:
    """Whether an open request needs a service, and when a request last stopped needing it.

    `last_needed_ms` is a time of the store's clock in ms since 1970; 0 if no request stopped needing the service within
    the last 10 minutes.
    """

    is_active: bool
    last_needed_ms: int


@dataclass(frozen=True)
class _TimedLoad:
    """A load, and the time.monotonic() timestamp until which it is reused."""

    load: StageLoad
    recent_until: float


class StageLoads:
    """Reads the load of services. A request of a service without a measured pace counts as `assumed_seconds`."""

    def __init__(self, redis: Redis, assumed_seconds: float) -> None:
        self._redis = redis
        self._assumed_seconds = assumed_seconds
        self._latest: dict[tuple[str, str], _TimedLoad] = {}
        self._reading: defaultdict[tuple[str, str], asyncio.Lock] = defaultdict(asyncio.Lock)

    async def activity(self, model: str, service: str) -> StageActivity:
        """Return whether a service of a model needs a worker. Raises Unavailable."""
        is_active, last_needed = await run_script(self._redis, "stage_activity", {"place": f"{model}/{service}"})
        return StageActivity(is_active=bool(is_active), last_needed_ms=int(last_needed))

    async def recent(self, model: str, service: str) -> StageLoad:
        """Return the load of a service of a model. Its age is at most 50 times the duration of its read.

        A read visits every waiting request. Because of the reuse, the reads of one service by this process take at
        most about 2% of the store's time, for any number of clients. Raises Unavailable.
        """
        key = (model, service)
        async with self._reading[key]:
            latest = self._latest.get(key)
            if latest is None or time.monotonic() >= latest.recent_until:
                return await self.read(model, service)
            return latest.load

    async def paces(self, model: str, service: str) -> list[generation_pb2.ServicePace]:
        """Return the measured paces of a service by shape, the latest first. Raises Unavailable."""
        reply = await command(self._redis, "HGETALL", f"{PREFIX}paces:{model}/{service}")
        pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
        paces = [_pace(shape, value) for shape, value in pairs]
        found = [pace for pace in paces if pace is not None]
        return sorted(found, key=lambda each: (-each.measured_at.ToMilliseconds(), each.shape))

    async def read(self, model: str, service: str) -> StageLoad:
        """Read the current load of a service of a model. Raises Unavailable."""
        began = time.monotonic()
        load = await self._read(model, service)
        now = time.monotonic()
        self._latest[model, service] = _TimedLoad(load, now + _REUSED * (now - began))
        return load

    async def _read(self, model: str, service: str) -> StageLoad:
        arguments: Arguments = {"place": f"{model}/{service}", "assumed": self._assumed_seconds}
        held, running, claims, waiting, open_requests, unmeasured = await run_script(
            self._redis, "stage_load", arguments
        )
        return StageLoad(
            workers_held=int(held),
            running_seconds=float(running),
            waiting_claims=int(claims),
            waiting_seconds=float(waiting),
            open_requests=int(open_requests),
            unmeasured=bool(unmeasured),
        )


def _pace(shape: bytes, value: bytes) -> generation_pb2.ServicePace | None:
    """Parse a pace of the script: compute seconds, steps, tokens of a step, time. Returns None if damaged."""
    try:
        seconds, steps, _, moment = value.split()
        pace = float(seconds) / float(steps)
        return generation_pb2.ServicePace(
            shape=shape.decode(), seconds_per_step=pace, measured_at=timestamp_of(int(moment))
        )
    except (ValueError, ZeroDivisionError):
        return None
