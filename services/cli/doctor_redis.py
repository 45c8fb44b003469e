"""Checks of the request store: server, configuration, durability, scripts, memory, replicas and clock."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Any, TypeAlias

from common.errors import FailedPrecondition, InternalError, Unavailable
from common.state.connection import PREFIX, command, connect, script_sha, script_source, store_errors
from common.state.redis_client import Redis
from common.state.replication import Replication
from common.state.store_server import StoreMemory, StoreSettings, check_server, read_facts
from services.cli.doctor_results import Check, Result, error, ok, warning

_OLDEST = (5, 0)
"""Oldest server version that has streams, and in which scripts may write after calling TIME."""

_OLDEST_TESTED = (7, 0)
"""Oldest server version that the tests cover."""

_SKEW_SECONDS = 1.0
"""Clock skew above which the result is a warning."""

_MOST_SKEW_SECONDS = 30.0
"""Clock skew above which services may refuse valid tokens: the default of jwt_leeway_seconds."""

_Results: TypeAlias = AsyncIterator[Result]


def redis_checks(url: str, store: Callable[[], StoreSettings], values: Callable[[], Mapping[str, Any]]) -> list[Check]:
    """The checks of the store at a URL. The settings are read when a check runs.

    `store` returns the accepted store configurations, `values` all settings of the service by name.
    """

    def check(name: str, advice: str, probe: Callable[[Redis], _Results], needs: str = "redis") -> Check:
        return Check(name, lambda: asyncio.run(_collect(url, probe)), advice, needs=needs)

    reach = "check host, port, user, password and TLS of --redis, and that the server is running"
    return [
        check("redis", reach, lambda redis: _server(redis, url), needs=""),
        check("redis policy", "use one primary", lambda redis: _policy(redis, store())),
        check("redis durability", reach, lambda redis: _durability(redis, store())),
        check("redis scripts", f"allow the ACL user to run scripts on keys {PREFIX}*", _scripts),
        check("redis memory", reach, lambda redis: _memory(redis, values().get("max_store_memory"))),
        check(
            "redis replicas",
            "connect that many replicas, or lower store_replicas",
            lambda redis: _replicas(redis, values().get("store_replicas", 0)),
        ),
        check("clock", reach, lambda redis: _clock(redis, values().get("jwt_leeway_seconds", _MOST_SKEW_SECONDS))),
    ]


async def _collect(url: str, probe: Callable[[Redis], _Results]) -> Iterable[Result]:
    redis = connect(url)
    try:
        return [result async for result in probe(redis)]
    finally:
        await redis.aclose()


async def _info(redis: Redis, section: str) -> Mapping[str, Any]:
    """The fields of a section of INFO; empty if the ACL user may not run INFO."""
    try:
        return dict(await command(redis, "INFO", section))
    except InternalError:
        return {}


async def _server(redis: Redis, url: str) -> _Results:
    """Check that the server answers, and report its latency and version."""
    started = time.monotonic()
    await command(redis, "PING")
    milliseconds = 1e3 * (time.monotonic() - started)
    info = await _info(redis, "server")
    name = "Valkey" if "valkey_version" in info else "Redis"
    version = str(info.get("valkey_version") or info.get("redis_version") or "")
    found = f"{url} answers in {milliseconds:.0f} ms"
    numbers = tuple(int(each) for each in re.findall(r"\d+", version)[:2])
    if not numbers:
        advice = f"allow the ACL user to run INFO, or check that the server is Redis {_dotted(_OLDEST_TESTED)} or newer"
        yield warning("redis", f"{found}; its version is unknown", advice)
    elif numbers < _OLDEST_TESTED:
        lacks = error if numbers < _OLDEST else warning
        rule = f"{_dotted(_OLDEST_TESTED)}, the oldest tested version"
        yield lacks("redis", f"{found}: {name} {version} is older than {rule}", "upgrade the server")
    else:
        yield ok("redis", f"{found}: {name} {version}")


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


async def _policy(redis: Redis, store: StoreSettings) -> _Results:
    """Check role, cluster mode and maxmemory-policy, as services do at start-up."""
    try:
        await check_server(redis, allow_eviction=store.allow_eviction, allow_data_loss=True)
    except FailedPrecondition as failure:
        yield error("redis policy", failure.message, "change this setting of Redis; with it, services exit with code 2")
        return
    facts = await read_facts(redis)
    if unknown := [name for name in facts.unknown if name not in ("appendonly", "appendfsync")]:
        yield warning(
            "redis policy",
            f"{', '.join(unknown)} cannot be read",
            "allow the ACL user to run INFO and CONFIG GET, or check that the server is a primary with "
            "maxmemory-policy noeviction",
        )
    elif facts.maxmemory_policy != "noeviction":
        yield warning(
            "redis policy",
            f"maxmemory-policy {facts.maxmemory_policy} deletes accepted requests when memory is full, as "
            "allow_eviction permits",
            "CONFIG SET maxmemory-policy noeviction",
        )
    else:
        yield ok("redis policy", f"role {facts.role}, no cluster, maxmemory-policy noeviction")


async def _durability(redis: Redis, store: StoreSettings) -> _Results:
    """Check that accepted requests survive a crash of the server."""
    facts = await read_facts(redis)
    advice = "set appendonly yes and appendfsync always, or allow_data_loss where requests may be lost"
    found = f"appendonly {facts.appendonly or 'unknown'}, appendfsync {facts.appendfsync or 'unknown'}"
    if facts.appendonly == "yes" and facts.appendfsync == "always":
        yield ok("redis durability", found)
    elif store.allow_data_loss:
        yield ok("redis durability", f"{found}, as allow_data_loss permits")
    elif "unknown" in found:
        yield warning("redis durability", found, f"allow the ACL user to run CONFIG GET, and {advice}")
    else:
        lost = "a restart" if facts.appendonly != "yes" else "a crash"
        yield warning("redis durability", f"{found}: {lost} of the server loses accepted requests", advice)


async def _scripts(redis: Redis) -> _Results:
    """Check that the ACL user may load the fleet's script, and that scripts may write the fleet's keys.

    Writes one key with a random name, and deletes it in the same script.
    """
    with store_errors():
        await redis.script_load(script_source())
    program = "redis.call('SET', KEYS[1], '1', 'PX', 1000) redis.call('TIME') return redis.call('DEL', KEYS[1])"
    await command(redis, "EVAL", program, 1, f"{PREFIX}doctor:{secrets.token_hex(8)}")
    (known,) = await command(redis, "SCRIPT", "EXISTS", script_sha())
    if known:
        yield ok("redis scripts", f"the fleet's script is loaded, and scripts may write {PREFIX}*")
    else:
        advice = "set --redis to the URL of one server, not of a proxy for several servers"
        yield error("redis scripts", "SCRIPT LOAD succeeded, but SCRIPT EXISTS does not find the script", advice)


async def _memory(redis: Redis, fraction: float | None) -> _Results:
    """Check the memory in use against the bound for new requests."""
    memory = StoreMemory(redis) if fraction is None else StoreMemory(redis, fraction)
    use = await memory.use()
    if use.is_full:
        yield error(
            "redis memory",
            f"{use} are in use, so new requests are refused",
            "raise maxmemory, or wait until results have expired",
        )
    elif use.maximum:
        yield ok("redis memory", f"{use} are in use")
    else:
        yield ok("redis memory", f"{use} are in use, without maxmemory")


async def _replicas(redis: Redis, needed: int) -> _Results:
    """Check that `needed` replicas acknowledge a write, as store_replicas requires."""
    info = await _info(redis, "replication")
    connected = info.get("connected_slaves", "an unknown number of")
    if not needed:
        yield ok("redis replicas", f"{connected} replicas are connected; store_replicas 0 waits for none")
        return
    replication = Replication(needed)
    started = time.monotonic()
    async with redis.pipeline(transaction=False) as pipeline:
        replication.follow(pipeline)
        with store_errors():
            replies = list(await pipeline.execute(raise_on_error=False))
    try:
        replication.check(replies)
    except Unavailable as failure:
        yield error(
            "redis replicas",
            f"{failure.message} ({connected} are connected)",
            "start the replicas, or lower store_replicas: no request is accepted",
        )
        return
    milliseconds = 1e3 * (time.monotonic() - started)
    yield ok("redis replicas", f"{needed} of {connected} replicas acknowledged a write in {milliseconds:.0f} ms")


async def _clock(redis: Redis, most_seconds: float) -> _Results:
    """Compare this host's clock with the server's TIME, on which leases and deadlines are based.

    The error of the measured skew is at most half the round-trip time.
    """
    await command(redis, "PING")  # Connect first, because connecting takes several round trips.
    before = time.time()
    seconds, microseconds = await command(redis, "TIME")
    after = time.time()
    skew = (before + after) / 2 - (int(seconds) + int(microseconds) / 1e6)
    yield skew_result(skew, (after - before) / 2, most_seconds)


def skew_result(skew: float, tolerance: float, most_seconds: float) -> Result:
    """The result for a clock that is `skew` ± `tolerance` seconds ahead of the server's clock."""
    found = f"this host is {abs(skew):.3f} s {'ahead of' if skew > 0 else 'behind'} the Redis server"
    advice = "synchronize the clocks of both hosts (chrony, systemd-timesyncd)"
    if abs(skew) - tolerance > max(most_seconds, _SKEW_SECONDS):
        return error("clock", f"{found}, so valid tokens and certificates may be refused", advice)
    if abs(skew) - tolerance > _SKEW_SECONDS:
        return warning("clock", found, advice)
    return ok("clock", f"{found} (±{tolerance:.3f} s)")
