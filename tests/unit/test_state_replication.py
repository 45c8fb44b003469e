"""Writes are acknowledged only once replicas have them, and so survive the loss of the primary."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from redis import Redis as BlockingRedis
from redis.asyncio import Redis

from async_tests import HANG_SECONDS, wait_until
from common.errors import Unavailable
from common.settings import SettingsError
from common.state import replication
from common.state.connection import command, connect
from common.state.records import CHUNK_BYTES, ResultFile
from common.state.replication import Replication
from common.state.requests import RequestStore
from common.state.result_items import StoredItem
from fleet.v1 import generation_pb2
from redis_servers import running_server
from sentinel_servers import Replicated, replicated_servers
from services.coordinator.settings import CoordinatorSettings

SUCCEEDED, CANCELLED = generation_pb2.REQUEST_STATE_SUCCEEDED, generation_pb2.REQUEST_STATE_CANCELLED

Scenario = Callable[[Replicated, Redis], Awaitable[None]]


@pytest.fixture(autouse=True)
def long_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for the acknowledgement of a replica, however slow the replica is."""
    monkeypatch.setattr(replication, "_ACKNOWLEDGE_SECONDS", HANG_SECONDS)


@contextmanager
def short_wait() -> Iterator[None]:
    """Wait only 0.3 s for an acknowledgement that no replica sends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replication, "_ACKNOWLEDGE_SECONDS", 0.3)
        yield


def run_on_replicated_servers(scenario: Scenario, *, sentinel: bool = False) -> None:
    """Run a test on a primary, a replica that has caught up and, if `sentinel`, a sentinel."""

    async def main(servers: Replicated) -> None:
        async with asyncio.timeout(HANG_SECONDS), connect(servers.url) as redis:
            await scenario(servers, redis)

    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-replicas-")))
        asyncio.run(main(stack.enter_context(replicated_servers(directory, sentinel=sentinel))))


def record(name: str) -> generation_pb2.RequestRecord:
    return generation_pb2.RequestRecord(request_id=name, model="emoji", caller="c")


def test_accepted_requests_survive_a_failover() -> None:
    async def scenario(servers: Replicated, redis: Redis) -> None:
        store = RequestStore(redis, replicas=1)
        for number in range(20):
            await store.admit(record(f"r{number}"))
        file = ResultFile(generation_pb2.FileHeader(count=1, byte_size=8), [b"the file"])
        assert await store.finish("r0", SUCCEEDED, files=[file])
        servers.kill_primary()

        async def is_promoted() -> bool:
            try:
                return (await store.get("r19")).request_id == "r19"
            except Unavailable:
                return False

        await wait_until(is_promoted)
        for number in range(1, 20):
            assert (await store.get(f"r{number}")).state == generation_pb2.REQUEST_STATE_QUEUED
        assert (await store.get("r0")).state == SUCCEEDED
        assert b"".join([chunk async for chunk in store.result_chunks("r0", 0, 8)]) == b"the file"
        # The new primary has no replica.
        with short_wait(), pytest.raises(Unavailable, match="0 replicas"):
            await store.admit(record("late"))

    run_on_replicated_servers(scenario, sentinel=True)


def test_a_request_is_accepted_only_once_a_replica_has_it() -> None:
    async def scenario(servers: Replicated, redis: Redis) -> None:
        store = RequestStore(redis, replicas=1)
        await store.admit(record("before"))
        servers.stop_replica()
        refusal = r"store_replicas: 0 replicas .* less than 1; connect more replicas"
        async with connect(servers.url) as fresh:
            # The attempt on another connection writes nothing, because the request or its end exists already.
            for attempt in (store, RequestStore(fresh, replicas=1)):
                with short_wait(), pytest.raises(Unavailable, match=refusal):
                    await attempt.admit(record("r"), idempotency_key="k")
        async with connect(servers.url) as fresh:
            for attempt in (store, RequestStore(fresh, replicas=1)):
                with short_wait(), pytest.raises(Unavailable, match=refusal):
                    await attempt.finish("before", CANCELLED, token="t")
        servers.continue_replica()
        assert (await store.admit(record("again"), idempotency_key="k")).record.request_id == "r"
        assert await store.finish("before", CANCELLED, token="t") is not None
        async with connect(servers.replica_url) as replica:
            states = await command(replica, "HMGET", "fleet:request:before", "state")
            assert states == [str(int(CANCELLED)).encode()]

    run_on_replicated_servers(scenario)


def test_a_result_that_lost_a_part_in_a_failover_is_written_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.state.records._BATCH_BYTES", CHUNK_BYTES)
    data = bytes(3 * CHUNK_BYTES)
    follow = Replication.follow

    async def scenario(servers: Replicated, redis: Redis) -> None:
        store = RequestStore(redis, replicas=1)
        await store.admit(record("r"))
        file = ResultFile(generation_pb2.FileHeader(count=1, byte_size=len(data)), [data])

        def lose_the_first_part(self: Replication, pipeline: Any, needed: Collection[str] = ()) -> None:
            with BlockingRedis.from_url(servers.url) as other:
                assert not needed or other.delete("fleet:result:r:1:0:0") == 1
            follow(self, pipeline, needed)

        monkeypatch.setattr(Replication, "follow", lose_the_first_part)
        with pytest.raises(Unavailable, match="2 of 3 parts of a result: a failover lost some"):
            await store.finish("r", SUCCEEDED, files=[file], token="t")
        monkeypatch.setattr(Replication, "follow", follow)
        assert await store.finish("r", SUCCEEDED, files=[file], token="t") is not None
        assert b"".join([chunk async for chunk in store.result_chunks("r", 0, len(data))]) == data

    run_on_replicated_servers(scenario)


def test_an_item_of_a_result_is_delivered_only_once_a_replica_has_it() -> None:
    async def scenario(servers: Replicated, redis: Redis) -> None:
        store = RequestStore(redis, replicas=1)
        await store.admit(record("r"))
        stored = StoredItem(generation_pb2.ResultItem(byte_size=3, file_count=1), 1)
        events = [generation_pb2.Event(item=stored.item)]
        servers.stop_replica()
        with short_wait(), pytest.raises(Unavailable, match="0 replicas"):
            await store.items.save("r", stored, [b"abc"])
        with short_wait(), pytest.raises(Unavailable, match="0 replicas"):
            await store.append("r", events, number=0)
        servers.continue_replica()
        await store.items.save("r", stored, [b"abc"])
        assert len(await store.append("r", events, number=0) or ()) == 1
        assert await store.delivered_items("r") == [stored]
        async with connect(servers.replica_url) as replica:
            assert await command(replica, "GET", "fleet:item:r:1:0:0") == b"abc"
            assert await command(replica, "XLEN", "fleet:events:r") == 2

    run_on_replicated_servers(scenario)


def test_a_missing_script_is_loaded_again() -> None:
    async def scenario(redis: Redis) -> None:
        await command(redis, "SCRIPT", "FLUSH")
        with short_wait(), pytest.raises(Unavailable, match="0 replicas"):
            await RequestStore(redis, replicas=1).admit(record("r"))
        assert (await RequestStore(redis).get("r")).request_id == "r"

    async def main(url: str) -> None:
        async with asyncio.timeout(HANG_SECONDS), connect(url) as redis:
            await scenario(redis)

    with running_server("valkey") as server:
        asyncio.run(main(server.url))


def test_a_negative_number_of_replicas_is_refused() -> None:
    with pytest.raises(SettingsError, match="store_replicas: -1 is not at least 0; 0 works"):
        CoordinatorSettings(store_replicas=-1)
