"""Events of a request are stored in order and do not block the request. Only superseded progress is dropped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

import pytest
from redis.asyncio import Redis

from common.errors import Unavailable
from common.state.requests import RequestStore
from fleet.v1 import generation_pb2
from redis_servers import RedisServer, run_on_empty_store
from services.coordinator.events import EventLog, EventWriter

LONG_SECONDS = 3_600.0


def run_on_request(server: RedisServer, test: Callable[[RequestStore], Awaitable[None]]) -> None:
    """Run a test on a store that has a request "r"."""

    async def on_request(redis: Redis) -> None:
        store = RequestStore(redis)
        await store.admit(generation_pb2.RequestRecord(request_id="r", model="m"))
        await test(store)

    run_on_empty_store(server.url, on_request)


def progress_of(events: Sequence[generation_pb2.Event]) -> list[tuple[str, int]]:
    return [(event.progress.service, event.progress.step) for event in events if event.HasField("progress")]


async def stored(store: RequestStore, count: int) -> list[generation_pb2.Event]:
    """The first `count` events after the admission."""
    events = [event async for event in _first(store, count + 1)]
    return events[1:]


async def _first(store: RequestStore, count: int) -> AsyncIterator[generation_pb2.Event]:
    async for event in store.events("r"):
        yield event
        count -= 1
        if not count:
            return


def test_only_the_latest_step_is_stored_while_writes_are_delayed(each_server: RedisServer) -> None:
    async def scenario(store: RequestStore) -> None:
        writer = EventWriter(store, "r", EventLog(), lambda: None, step_seconds=LONG_SECONDS)
        writer.progress("denoising", 0, 50)
        assert progress_of(await stored(store, 1)) == [("denoising", 0)]
        for step in range(1, 50):
            writer.progress("denoising", step, 50)
            await asyncio.sleep(0)
        writer.progress("decoding", 0, 1)
        assert progress_of(await stored(store, 3)) == [("denoising", 0), ("denoising", 49), ("decoding", 0)]
        writer.progress("denoising", 50, 50)
        writer.progress("decoding", 1, 1)
        await writer.close()
        assert progress_of(await writer.rest()) == [("denoising", 50), ("decoding", 1)]

    run_on_request(each_server, scenario)


def test_events_are_buffered_while_the_store_is_unavailable(each_server: RedisServer) -> None:
    async def scenario(store: RequestStore) -> None:
        writer = EventWriter(store, "r", EventLog(), lambda: None)
        each_server.kill()
        writer.warning("prompt", "cut")
        writer.progress("denoising", 1, 2)
        await asyncio.sleep(0.01)
        writer.progress("denoising", 2, 2)
        each_server.start()
        events = await stored(store, 2)
        assert events[0].warning.message == "cut"
        await writer.close()
        rest = progress_of([*events, *await writer.rest()])
        assert rest[-1] == ("denoising", 2) or progress_of(await stored(store, 3))[-1] == ("denoising", 2)

    run_on_request(each_server, scenario)


def test_closing_does_not_wait_for_an_unavailable_store(each_server: RedisServer) -> None:
    async def scenario(store: RequestStore) -> None:
        writer = EventWriter(store, "r", EventLog(), lambda: None)
        each_server.kill()
        writer.warning("prompt", "cut")
        await asyncio.sleep(0.01)
        async with asyncio.timeout(5):
            await writer.close()
        with pytest.raises(Unavailable):
            await writer.rest()
        each_server.start()
        assert not await writer.rest()
        assert [event.warning.message for event in await stored(store, 1)] == ["cut"]

    run_on_request(each_server, scenario)


def test_event_writer_detects_that_its_request_has_ended_in_the_store(each_server: RedisServer) -> None:
    async def scenario(store: RequestStore) -> None:
        ended = asyncio.Event()
        writer = EventWriter(store, "r", EventLog(), ended.set)
        await store.finish("r", generation_pb2.REQUEST_STATE_FAILED)
        writer.progress("denoising", 1, 2)
        await ended.wait()
        await writer.close()

    run_on_request(each_server, scenario)
