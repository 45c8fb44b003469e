"""Redis server of the store: validation of its configuration, and its memory usage."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from common.errors import FailedPrecondition, InternalError, Unavailable
from common.logs import get_logger
from common.settings import setting
from common.state.connection import CLUSTER_UNSUPPORTED, PREFIX, command, follows_sentinels, script_source
from common.state.redis_client import Redis

DEFAULT_MEMORY_FRACTION = 0.9
_READ_SECONDS = 1.0  # interval at which the server's memory usage is read
_MIB = 1 << 20

_log = get_logger(__name__)


@dataclass(frozen=True)
class ServerFacts:
    """Configuration of a server, by the names of Redis. Values that the server does not report are empty."""

    role: str
    cluster_enabled: str
    maxmemory_policy: str
    appendonly: str
    appendfsync: str

    @property
    def unknown(self) -> list[str]:
        """Redis names of the settings that the server does not report."""
        return [name.replace("_", "-") for name, value in vars(self).items() if not value]

    @property
    def is_durable(self) -> bool | None:
        """Whether accepted requests survive a crash of the server's host; None if unknown."""
        if not self.appendonly or (self.appendonly == "yes" and not self.appendfsync):
            return None
        return self.appendonly == "yes" and self.appendfsync == "always"


async def read_facts(redis: Redis) -> ServerFacts:
    """Read the configuration with INFO, and with CONFIG GET and ROLE for values that INFO lacks. Raises Unavailable."""
    info = await _info(redis)
    aof = {"0": "no", "1": "yes"}.get(str(info.get("aof_enabled")), "")
    cluster = {"0": "no", "1": "yes"}.get(str(info.get("cluster_enabled")), "")
    return ServerFacts(
        role=str(info.get("role", "")) or await _role(redis),
        cluster_enabled=cluster or await _config(redis, "cluster-enabled"),
        maxmemory_policy=str(info.get("maxmemory_policy", "")) or await _config(redis, "maxmemory-policy"),
        appendonly=aof or await _config(redis, "appendonly"),
        appendfsync=await _config(redis, "appendfsync"),
    )


async def _info(redis: Redis) -> Mapping[str, Any]:
    """Return the fields of INFO; empty if the user has no permission for it."""
    try:
        return dict(await command(redis, "INFO"))
    except InternalError:
        return {}


async def _config(redis: Redis, name: str) -> str:
    """Return a configuration value; empty without permission, or without CONFIG in a managed service."""
    try:
        pair = await command(redis, "CONFIG", "GET", name)
    except InternalError:
        return ""
    return bytes(pair[1]).decode() if pair else ""


async def _role(redis: Redis) -> str:
    try:
        return bytes((await command(redis, "ROLE"))[0]).decode()
    except InternalError:
        return ""


async def check_server(redis: Redis, *, allow_eviction: bool = False, allow_data_loss: bool = False) -> None:
    """Validate the server's configuration, and log whether accepted requests are durable.

    Raises FailedPrecondition for a Redis Cluster, for a replica, and for a server that evicts keys unless
    `allow_eviction`. Raises Unavailable if the server does not respond, and for a replica that sentinels report as
    the primary. `allow_data_loss` omits the warning about a store that is not durable.
    """
    facts = await read_facts(redis)
    _refuse(facts, allow_eviction=allow_eviction, follows=follows_sentinels(redis))
    found = {name: value for name, value in vars(facts).items() if value}
    if facts.unknown:
        _log.warning(
            "request store is not fully checked: its user has no permission for INFO or CONFIG",
            unknown=facts.unknown,
            needed="a primary without cluster mode; maxmemory-policy noeviction, appendonly yes, appendfsync always",
            **found,
        )
    loss = _loss(facts)
    if loss and not allow_data_loss:
        fix = "set appendonly yes and appendfsync always"
        _log.warning("request store is not durable", loss=loss, fix=fix, **found)
    if facts.maxmemory_policy not in ("", "noeviction"):
        _log.warning("request store evicts keys, as allow_eviction permits: accepted requests can disappear", **found)
    elif not loss and not facts.unknown:
        _log.info("request store is durable: accepted requests survive its restart", **found)


@dataclass(frozen=True, kw_only=True)
class StoreSettings:
    """Settings of all processes that use the store: accepted configurations of its server."""

    allow_eviction: bool = setting(False, help="accept a store whose maxmemory-policy can delete accepted requests")
    allow_data_loss: bool = setting(False, help="omit the warning that the store is not durable")

    async def check_store(self, redis: Redis) -> None:
        """Validate the server of the store with these settings. Raises the errors of check_server()."""
        await check_server(redis, allow_eviction=self.allow_eviction, allow_data_loss=self.allow_data_loss)


def _refuse(facts: ServerFacts, *, allow_eviction: bool, follows: bool) -> None:
    """Raise FailedPrecondition for a server that cannot store the fleet's state."""
    if facts.cluster_enabled == "yes":
        raise FailedPrecondition(CLUSTER_UNSUPPORTED, field="redis")
    if facts.role in ("slave", "replica"):
        message = "redis: this server is a replica and does not accept writes; use the primary's address, or "
        message += "redis+sentinel://HOST:26379/SERVICE to follow the primary"
        if follows:  # Sentinels report a new primary before its promotion is complete.
            raise Unavailable(message)
        raise FailedPrecondition(message, field="redis")
    policy = facts.maxmemory_policy
    if policy not in ("", "noeviction") and not allow_eviction:
        lost = "heartbeats, queues of workers and results" if policy.startswith("volatile") else "accepted requests"
        raise FailedPrecondition(
            f"redis: maxmemory-policy {policy} is not noeviction; a full server would delete {lost}: set "
            "maxmemory-policy noeviction, or start with allow_eviction",
            field="redis",
        )


def _loss(facts: ServerFacts) -> str:
    """Describe which accepted requests a crash of the server loses; empty for none or unknown."""
    if facts.appendonly == "no":
        return "it loses accepted requests when it restarts"
    if facts.appendonly and facts.appendfsync in ("everysec", "no"):
        span = "last second" if facts.appendfsync == "everysec" else "last half minute"
        return f"a crash of its host loses the requests accepted in the {span}"
    return ""


class MemoryUse(NamedTuple):
    """Memory of a server in bytes. `limit` is the used memory at which requests are refused; 0 for no limit."""

    used: int
    maximum: int
    limit: int

    @property
    def is_full(self) -> bool:
        """Whether new requests are refused, so that accepted requests can complete."""
        return bool(self.limit) and self.used >= self.limit

    def __str__(self) -> str:
        of = f" of {self.maximum / _MIB:.1f} MiB" if self.maximum else ""
        return f"{self.used / _MIB:.1f} MiB{of}"


class StoreMemory:
    """Memory usage of the store, plus the requests accepted since the last read.

    The usage is read at most every `read_seconds`. New requests are refused above `fraction` of the server's maxmemory.
    There is no limit if maxmemory is 0 or unknown.
    """

    def __init__(
        self, redis: Redis, fraction: float = DEFAULT_MEMORY_FRACTION, *, read_seconds: float = _READ_SECONDS
    ) -> None:
        self._redis = redis
        self._read_seconds = read_seconds
        self._fraction = fraction
        self._use = MemoryUse(0, 0, 0)
        self._added = 0
        self._read_at = -math.inf
        self._reading = asyncio.Lock()

    async def use(self, adding: int = 0) -> MemoryUse:
        """Return the current memory usage, and add `adding` bytes that will be stored. Raises Unavailable."""
        if time.monotonic() - self._read_at >= self._read_seconds:
            async with self._reading:
                if time.monotonic() - self._read_at >= self._read_seconds:
                    await self._read()
        self._added += adding
        return self._use._replace(used=self._use.used + self._added - adding)

    async def _read(self) -> None:
        """Read the memory usage that counts towards maxmemory, without buffers of replicas and of the AOF."""
        try:
            info: Mapping[str, Any] = await command(self._redis, "INFO", "memory")
        except InternalError:  # The user has no permission for INFO. A full server then refuses writes itself.
            info = {}
        maximum = int(info.get("maxmemory", 0))
        used = int(info.get("used_memory", 0)) - int(info.get("mem_not_counted_for_evict", 0))
        self._use = MemoryUse(used, maximum, int(maximum * self._fraction))
        self._added = 0
        self._read_at = time.monotonic()


@cache
def repair_kinds() -> frozenset[str]:
    """Return the kinds of damage that the script counts, which bound the values of the metric's label."""
    return frozenset(re.findall(r"repaired\('(\w+)'", script_source()))


async def read_repairs(redis: Redis) -> dict[str, int]:
    """Return how often the script has removed damage, by kind, since the store was created."""
    try:
        reply = await command(redis, "HGETALL", PREFIX + "repairs")
    except InternalError:  # The key has another type; the next repair replaces it.
        return {}
    pairs = reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)
    return {kind.decode(): int(count) for kind, count in pairs}
