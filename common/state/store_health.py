"""Status of the request store for clients: memory, durability, replicas and round-trip time."""

from __future__ import annotations

import math
import time

from common.errors import InternalError
from common.state.connection import command, follows_sentinels
from common.state.redis_client import Redis
from common.state.store_server import ServerFacts, StoreMemory, read_facts
from fleet.v1 import generation_pb2

_FACTS_SECONDS = 10.0  # interval at which the server's configuration is read


class StoreHealth:
    """Reads the status of the store. `required_replicas` replicas must acknowledge the admission of a request."""

    def __init__(self, redis: Redis, memory: StoreMemory, *, required_replicas: int = 0) -> None:
        self._redis = redis
        self._memory = memory
        self._required_replicas = required_replicas
        self._facts: ServerFacts | None = None
        self._read_at = -math.inf

    async def read(self) -> generation_pb2.StoreStatus:
        """Read the current status. The server's configuration is at most 10 s old. Raises Unavailable."""
        began = time.perf_counter()
        await command(self._redis, "PING")
        round_trip = time.perf_counter() - began
        use = await self._memory.use()
        facts = await self._read_facts()
        return generation_pb2.StoreStatus(
            used_bytes=max(use.used, 0),
            max_bytes=use.maximum,
            limit_bytes=use.limit,
            is_full=use.is_full,
            role=facts.role,
            is_durable=facts.is_durable,
            appendonly=facts.appendonly,
            appendfsync=facts.appendfsync,
            maxmemory_policy=facts.maxmemory_policy,
            replicas=await self._replicas(),
            required_replicas=self._required_replicas,
            follows_sentinels=follows_sentinels(self._redis),
            round_trip_seconds=round_trip,
        )

    async def _read_facts(self) -> ServerFacts:
        if self._facts is None or time.monotonic() - self._read_at >= _FACTS_SECONDS:
            self._facts = await read_facts(self._redis)
            self._read_at = time.monotonic()
        return self._facts

    async def _replicas(self) -> int:
        """Return the number of connected replicas; 0 if the user has no permission for INFO."""
        try:
            info = await command(self._redis, "INFO", "replication")
        except InternalError:
            return 0
        return int(info.get("connected_slaves", 0))
