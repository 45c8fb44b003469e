"""Checks of a Redis server's configuration, and behavior with full memory, on real servers."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys

import pytest
from redis.asyncio import Redis

from async_tests import HANG_SECONDS, wait_until
from common.errors import FailedPrecondition, InternalError, InvalidInput, ResourceExhausted, Unavailable
from common.state.connection import Arguments, StoreFull, command, connect, run_script
from common.state.presence import Presence
from common.state.records import ResultFile, State
from common.state.requests import RequestStore
from common.state.store_server import StoreMemory, check_server, read_repairs
from fleet.v1 import generation_pb2
from redis_servers import fill, run_on_empty_store, running_server, unfill
from services import stage_services
from services.cli.store import check_store

MIB = 1 << 20
DEFAULTS = {"maxmemory": "0", "maxmemory-policy": "noeviction", "appendonly": "yes", "appendfsync": "always"}
LOGGER = "common.state.store_server"
CLAIM: Arguments = {
    "place": "emoji/denoising",
    "owner": "me",
    "priority": 0,
    "cost": 1,
    "deadline": 0,
    "caller": "",
    "wiring": "",
}


async def configure(redis: Redis, **values: str) -> None:
    """Set the configuration values of DEFAULTS, overridden by `values`."""
    for name, value in {**DEFAULTS, **{name.replace("_", "-"): value for name, value in values.items()}}.items():
        await command(redis, "CONFIG", "SET", name, value)


def logged_lines(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Level and message of each log line since the last call."""
    found = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == LOGGER]
    caplog.clear()
    return found


def test_a_durable_primary_is_logged_as_durable(each_store_url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, LOGGER)

    async def scenario(redis: Redis) -> None:
        await configure(redis)
        await check_server(redis)

    run_on_empty_store(each_store_url, scenario)
    [(level, text)] = logged_lines(caplog)
    assert level == "INFO"
    assert text.startswith("request store is durable: ")
    assert "role=master cluster_enabled=no maxmemory_policy=noeviction appendonly=yes appendfsync=always" in text


@pytest.mark.parametrize(
    ("policy", "lost"), [("allkeys-lru", "accepted requests"), ("volatile-ttl", "heartbeats, queues of workers")]
)
def test_an_evicting_server_is_refused_unless_allowed(
    each_store_url: str, policy: str, lost: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(redis: Redis) -> None:
        await configure(redis, maxmemory_policy=policy)
        with pytest.raises(FailedPrecondition, match=f"maxmemory-policy {policy} is not noeviction.*{lost}") as caught:
            await check_server(redis)
        assert caught.value.field == "redis"
        await check_server(redis, allow_eviction=True)
        await configure(redis)

    run_on_empty_store(each_store_url, scenario)
    [(level, text)] = logged_lines(caplog)
    assert level == "WARNING"
    assert "evicts keys, as allow_eviction permits" in text


@pytest.mark.parametrize(
    ("values", "loss"),
    [
        ({"appendonly": "no"}, "loses accepted requests when it restarts"),
        ({"appendfsync": "everysec"}, "loses the requests accepted in the last second"),
        ({"appendfsync": "no"}, "loses the requests accepted in the last half minute"),
    ],
)
def test_a_warning_is_logged_for_a_store_that_is_not_durable(
    each_store_url: str, values: dict[str, str], loss: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(redis: Redis) -> None:
        await configure(redis, **values)
        await check_server(redis)
        await check_server(redis, allow_data_loss=True)
        await configure(redis)

    run_on_empty_store(each_store_url, scenario)
    [(level, text)] = logged_lines(caplog)
    assert level == "WARNING"
    assert loss in text


def test_checks_that_an_acl_user_may_not_run_are_logged(each_store_url: str, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(redis: Redis) -> None:
        await configure(redis, maxmemory_policy="allkeys-lru")
        await command(redis, "ACL", "SETUSER", "blind", "on", ">word", "~*", "&*", "+@all", "-config", "-info", "-role")
        await command(redis, "ACL", "SETUSER", "managed", "on", ">word", "~*", "&*", "+@all", "-config")
        blind = Redis.from_url(each_store_url, username="blind", password="word", protocol=2)
        await check_server(blind)
        assert not (await StoreMemory(blind).use()).limit
        await blind.aclose()
        managed = Redis.from_url(each_store_url, username="managed", password="word", protocol=2)
        with pytest.raises(FailedPrecondition, match="allkeys-lru"):  # INFO has the policy where CONFIG is forbidden
            await check_server(managed)
        await configure(redis)
        await check_server(managed)
        await managed.aclose()

    run_on_empty_store(each_store_url, scenario)
    (level, first), (_, second) = logged_lines(caplog)
    assert level == "WARNING"
    assert (
        "its user has no permission for INFO or CONFIG "
        "unknown=role,cluster-enabled,maxmemory-policy,appendonly,appendfsync" in first
    )
    assert "its user has no permission for INFO or CONFIG unknown=appendfsync needed=" in second


def test_a_replica_is_refused(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        await command(redis, "REPLICAOF", "127.0.0.1", "1")
        try:
            with pytest.raises(
                FailedPrecondition, match=r"is a replica and does not accept writes; .*redis\+sentinel://"
            ):
                await check_server(redis)
            with pytest.raises(Unavailable, match="does not accept writes"):
                await run_script(redis, "beat", {"owner": "me", "lasts": 1_000})
        finally:
            await command(redis, "REPLICAOF", "NO", "ONE")

    run_on_empty_store(each_store_url, scenario)


def test_commands_and_coordinators_refuse_an_evicting_store(each_store_url: str) -> None:
    async def set_eviction(redis: Redis) -> None:
        await configure(redis, maxmemory_policy="allkeys-random")

    async def reset(redis: Redis) -> None:
        await configure(redis)

    run_on_empty_store(each_store_url, set_eviction)
    with pytest.raises(InvalidInput, match="maxmemory-policy allkeys-random") as caught:
        check_store(each_store_url, {})
    assert caught.value.field == "redis"
    check_store(each_store_url, {"FLEET_ALLOW_EVICTION": "1"})
    argv = [sys.executable, "-m", "services.coordinator", "--redis", each_store_url, "--listen", "127.0.0.1:0"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 2
    assert "coordinator: redis: maxmemory-policy allkeys-random is not noeviction; " in done.stderr
    assert "Traceback" not in done.stderr
    run_on_empty_store(each_store_url, reset)


def test_a_worker_refuses_an_evicting_store_with_exit_code_2(
    each_store_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def set_eviction(redis: Redis) -> None:
        await configure(redis, maxmemory_policy="allkeys-random")

    async def reset(redis: Redis) -> None:
        await configure(redis)

    run_on_empty_store(each_store_url, set_eviction)
    assert stage_services.main("text_encoding", ["--model", "emoji", "--redis", each_store_url, "--device", "cpu"]) == 2
    assert "redis: maxmemory-policy allkeys-random is not noeviction; " in capsys.readouterr().err
    run_on_empty_store(each_store_url, reset)


def free_port() -> int:
    """A free port whose cluster bus port is a valid port number, too."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            if (port := probe.getsockname()[1]) < 55_000:
                return int(port)


def test_a_redis_cluster_is_refused_by_checks_and_by_calls() -> None:
    ports = free_port(), free_port()
    options = [("--cluster-enabled", "yes", "--port", str(port), "--appendfsync", "no") for port in ports]

    async def scenario(redis: Redis) -> None:
        async with connect(second.url) as other:
            await command(redis, "CLUSTER", "ADDSLOTSRANGE", 0, 8191)
            await command(other, "CLUSTER", "ADDSLOTSRANGE", 8192, 16383)
            await command(redis, "CLUSTER", "MEET", "127.0.0.1", ports[1])

            async def formed() -> bool:
                states = [await command(each, "CLUSTER", "INFO") for each in (redis, other)]
                return all(b"cluster_state:ok" in state for state in states)

            await wait_until(formed)
            message = "is part of a Redis Cluster.*one primary.*Sentinel.*managed service with cluster mode disabled"
            with pytest.raises(FailedPrecondition, match=message):
                await check_server(redis)
            # A process that has not checked the server gets the same error.
            with pytest.raises(FailedPrecondition, match=message):
                await asyncio.gather(
                    *(run_script(each, "beat", {"owner": "a", "lasts": 1_000}) for each in (redis, other))
                )

    with running_server("valkey", *options[0]) as first, running_server("valkey", *options[1]) as second:
        run_on_empty_store(first.url, scenario)


def record(name: str) -> generation_pb2.RequestRecord:
    return generation_pb2.RequestRecord(request_id=name, model="emoji")


def image_file(size: int) -> ResultFile:
    return ResultFile(generation_pb2.FileHeader(byte_size=size), [bytes(size)])


def test_a_nearly_full_store_refuses_new_requests_and_ends_accepted_requests(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        await configure(redis, maxmemory=str(60 * MIB))
        store = RequestStore(redis, owner="me", memory=StoreMemory(redis, 0.9, read_seconds=0))
        await store.admit(record("accepted"), idempotency_key="k")
        assert await fill(redis, int(54.5 * MIB)) > 0.9 * 60 * MIB
        with pytest.raises(ResourceExhausted, match=r"full: it uses 5\d\.\d MiB of 60\.0 MiB") as caught:
            await store.admit(record("refused"))
        assert caught.value.retry_seconds == 5.0
        assert (await store.admit(record("again"), idempotency_key="k")).replayed
        assert await store.finish("accepted", State.REQUEST_STATE_SUCCEEDED, files=[image_file(MIB)])
        assert sum([len(chunk) async for chunk in store.result_chunks("accepted", 0, MIB)]) == MIB
        await unfill(redis)
        await store.admit(record("later"))
        await configure(redis)

    run_on_empty_store(each_store_url, scenario)


def test_requests_accepted_since_the_last_read_of_memory_count_towards_the_bound(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        await configure(redis, maxmemory=str(60 * MIB))
        store = RequestStore(redis, owner="me", memory=StoreMemory(redis, 0.3, read_seconds=3_600))
        for number in range(3):
            await store.admit(record(f"r{number}"), submission=bytes(6 * MIB))
        with pytest.raises(ResourceExhausted, match="the request store is full"):
            await store.admit(record("r3"))
        await configure(redis)

    run_on_empty_store(each_store_url, scenario)


def test_a_full_store_is_reported_as_full_and_accepts_heartbeats(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        unbounded = RequestStore(redis, owner="me")
        presence = Presence(redis, "me")
        await presence.start()
        await unbounded.admit(record("accepted"))
        used = await fill(redis, int(21.5 * MIB))
        await configure(redis, maxmemory=str(used - MIB))
        with pytest.raises(ResourceExhausted, match="full: it has used its maxmemory") as caught:
            await unbounded.admit(record("refused"))
        assert caught.value.retry_seconds == 5.0
        await run_script(redis, "beat", {"owner": "me", "lasts": 60_000})
        await run_script(redis, "claim", {"ticket": "accepted/me/0", **CLAIM})
        await run_script(redis, "release", {"ticket": "accepted/me/0", "place": "emoji/denoising", "used": 0})
        with pytest.raises(StoreFull, match="request store is full") as failed:
            await unbounded.finish("accepted", State.REQUEST_STATE_SUCCEEDED, files=[image_file(MIB)], token="t")
        assert "unavailable" not in str(failed.value)
        # A request does not end without its files.
        assert (await unbounded.get("accepted")).state == State.REQUEST_STATE_QUEUED
        await unfill(redis)
        assert await unbounded.finish("accepted", State.REQUEST_STATE_SUCCEEDED, files=[image_file(MIB)], token="t")
        await presence.stop()
        await configure(redis)

    run_on_empty_store(each_store_url, scenario)


def test_repairs_are_read_by_kind(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        assert await read_repairs(redis) == {}
        await redis.zadd("fleet:queue:emoji/denoising", {"malformed": 0})
        await redis.set("fleet:slots:emoji/denoising", "another type")
        await run_script(redis, "claim", {"ticket": "r/me/0", **CLAIM})
        assert await read_repairs(redis) == {"queue": 1, "type": 1}
        await redis.delete("fleet:repairs")
        await redis.set("fleet:repairs", "another type")
        assert await read_repairs(redis) == {}

    run_on_empty_store(each_store_url, scenario)


def test_pages_omit_a_record_of_another_type_and_errors_of_other_calls_name_it(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis, owner="me")
        for name in ("a", "b", "c"):
            await store.admit(record(name))
        await redis.delete("fleet:request:b")
        await redis.set("fleet:request:b", "another type")
        records, _ = await store.page()
        assert [each.request_id for each in records] == ["c", "a"]
        damaged = "request store is damaged: fleet:request:b .*; delete that key"
        with pytest.raises(InternalError, match=damaged):
            await store.get("b")
        with pytest.raises(InternalError, match=damaged):
            await store.request_cancel("b")

    run_on_empty_store(each_store_url, scenario)
