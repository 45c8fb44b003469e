"""Stored items of streamed results: an event delivers each item once, whichever coordinator writes it."""

from __future__ import annotations

import asyncio
import secrets

import pytest
from redis.asyncio import Redis

from async_tests import wait_until
from common.errors import NotFound, Unavailable
from common.state.connection import StoreFull, connect, script_sha
from common.state.leases import Leases
from common.state.presence import Presence
from common.state.records import ResultFile
from common.state.requests import RequestStore, Retention
from common.state.result_items import StoredItem
from fleet.v1 import generation_pb2 as pb
from redis_servers import run_on_empty_store, running_server

MIB = 1 << 20
SUCCEEDED, FAILED = pb.REQUEST_STATE_SUCCEEDED, pb.REQUEST_STATE_FAILED


def stored_item(number: int, size: int, epoch: int = 1) -> StoredItem:
    return StoredItem(pb.ResultItem(item_index=number, file_count=1, byte_size=size), epoch)


def event_of(stored: StoredItem) -> pb.Event:
    return pb.Event(item=stored.item)


async def admit(store: RequestStore) -> str:
    record = pb.RequestRecord(request_id=secrets.token_hex(8), model="emoji")
    return (await store.admit(record)).record.request_id


async def read(store: RequestStore, request_id: str, stored: StoredItem, skipped: int = 0) -> bytes:
    return b"".join([chunk async for chunk in store.items.chunks(request_id, stored, skipped)])


async def deliver(store: RequestStore, request_id: str, stored: StoredItem, data: bytes, number: int) -> bool:
    """Store an item's bytes, then its event. Returns whether the event was accepted."""
    await store.items.save(request_id, stored, [data])
    return await store.append(request_id, [event_of(stored)], number=number, epoch=stored.epoch) is not None


def test_an_item_is_read_from_any_byte(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis)
        request_id, data = await admit(store), secrets.token_bytes(2 * MIB + 5)
        stored = stored_item(0, len(data))
        assert await deliver(store, request_id, stored, data, 0)
        assert await store.delivered_items(request_id) == [stored]
        for skipped in (0, 1, MIB - 1, MIB, MIB + 1, 2 * MIB, len(data) - 1, len(data)):
            assert await read(store, request_id, stored, skipped) == data[skipped:]
        sizes = [len(chunk) async for chunk in store.items.chunks(request_id, stored)]
        assert sizes == [MIB, MIB, 5]

    run_on_empty_store(each_store_url, scenario)


def test_bytes_without_an_event_are_not_an_item(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis)
        request_id = await admit(store)
        await store.items.save(request_id, stored_item(0, 3), [b"abc"])
        assert await store.delivered_items(request_id) == []
        assert await store.finish(request_id, SUCCEEDED)
        kinds = [event.WhichOneof("kind") async for event in store.events(request_id)]
        assert kinds == ["state_change", "state_change"]

    run_on_empty_store(each_store_url, scenario)


def test_a_repeated_event_delivers_its_item_once(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis)
        request_id, stored = await admit(store), stored_item(0, 3)
        assert await deliver(store, request_id, stored, b"abc", 0)
        assert await deliver(store, request_id, stored, b"abc", 0)
        assert await store.delivered_items(request_id) == [stored]

    run_on_empty_store(each_store_url, scenario)


def test_a_former_owner_neither_adds_nor_changes_nor_expires_an_item(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        former = RequestStore(redis, owner="former", retention=Retention(result_seconds=0.02))
        request_id = await admit(former)
        first = stored_item(0, 3)
        assert await deliver(former, request_id, first, b"abc", 0)
        presence = Presence(redis, "new")
        await presence.start()
        ((inherited,), _) = await Leases(redis, "new").take_over("emoji")
        store, epoch = RequestStore(redis, owner="new"), inherited.epoch
        assert await store.delivered_items(request_id) == [first]
        late, second = stored_item(1, 4), stored_item(1, 4, epoch)
        assert not await deliver(former, request_id, late, b"late", 1)
        assert await deliver(store, request_id, second, b"good", 0)
        assert not await deliver(former, request_id, late, b"LATE", 1)
        assert await former.finish(request_id, FAILED, items=[first, late]) is None
        await asyncio.sleep(0.05)  # longer than the former owner retains results
        assert await store.delivered_items(request_id) == [first, second]
        assert [await read(store, request_id, each) for each in (first, second)] == [b"abc", b"good"]
        assert await store.finish(request_id, SUCCEEDED, epoch=epoch, items=[first, second])
        await presence.stop()

    run_on_empty_store(each_store_url, scenario)


@pytest.mark.parametrize(("end", "max_ms"), [(SUCCEEDED, 3_600_000), (FAILED, 60_000)])
def test_items_expire_within_the_retention_of_the_end_state(
    each_store_url: str, end: pb.RequestState.ValueType, max_ms: int
) -> None:
    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis)
        request_id, stored = await admit(store), stored_item(0, MIB + 1)
        assert await deliver(store, request_id, stored, b"x" * (MIB + 1), 0)
        keys = await redis.keys("fleet:item:*")
        assert len(keys) == 2
        assert all([await redis.pttl(key) > 80_000_000 for key in keys])
        assert await store.finish(request_id, end, items=[stored])
        assert all([max_ms - 20_000 < await redis.pttl(key) <= max_ms for key in keys])

    run_on_empty_store(each_store_url, scenario)


def test_an_item_that_has_expired_is_not_found(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis, retention=Retention(record_seconds=60, result_seconds=0.02))
        request_id, stored = await admit(store), stored_item(0, 3)
        assert await deliver(store, request_id, stored, b"abc", 0)
        assert await store.finish(request_id, SUCCEEDED, items=[stored])

        async def is_expired() -> bool:
            return not await redis.keys("fleet:item:*")

        await wait_until(is_expired)
        with pytest.raises(NotFound, match="has expired"):
            await read(store, request_id, stored)

    run_on_empty_store(each_store_url, scenario)


def test_an_end_repeated_after_a_lost_reply_sets_the_expiry_of_the_items(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis)
        request_id, stored = await admit(store), stored_item(0, 3)
        assert await deliver(store, request_id, stored, b"abc", 0)
        assert await store.finish(request_id, SUCCEEDED, token="mine")
        assert await store.finish(request_id, SUCCEEDED, token="mine", items=[stored]) == []
        (key,) = await redis.keys("fleet:item:*")
        assert await redis.pttl(key) <= 3_600_000

    run_on_empty_store(each_store_url, scenario)


def test_an_event_of_an_item_reloads_a_missing_script(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis)
        request_id, stored = await admit(store), stored_item(0, 3)
        await redis.script_flush()
        assert await redis.script_exists(script_sha()) == [False]
        assert await deliver(store, request_id, stored, b"abc", 0)

    run_on_empty_store(each_store_url, scenario)


def test_a_full_store_refuses_items_and_a_killed_store_is_unavailable() -> None:
    with running_server("valkey", "--maxmemory", str(8 * MIB)) as server:

        async def scenario() -> None:
            async with connect(server.url) as redis:
                store = RequestStore(redis)
                request_id, stored = await admit(store), stored_item(0, 12 * MIB)
                with pytest.raises(StoreFull):
                    await store.items.save(request_id, stored, [bytes(12 * MIB)])
                for key in await redis.keys("fleet:item:*"):
                    await redis.delete(key)
                small = stored_item(0, 3)
                assert await deliver(store, request_id, small, b"abc", 0)
                server.kill()
                with pytest.raises(Unavailable, match="is unavailable"):
                    await store.items.save(request_id, small, [b"abc"])
                server.start()
                assert await read(store, request_id, small) == b"abc"
                assert await store.delivered_items(request_id) == [small]

        asyncio.run(scenario())


def test_a_record_stores_no_bytes_of_a_streamed_file(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis)
        request_id, stored = await admit(store), stored_item(0, 3)
        assert await deliver(store, request_id, stored, b"abc", 0)
        header = pb.FileHeader(count=1, byte_size=3, num_items=1)
        assert await store.finish(request_id, SUCCEEDED, files=[ResultFile(header, ())], items=[stored])
        assert list((await store.get(request_id)).files) == [header]
        assert not await redis.keys("fleet:result:*")

    run_on_empty_store(each_store_url, scenario)
