"""Requests that change hands, against real servers: take-over, fencing, deaths, checkpoints, pace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis.asyncio import Redis

from common.errors import NotFound
from common.state.leases import Leases
from common.state.records import ResultFile, state_event
from common.state.requests import RequestStore
from fleet.v1 import generation_pb2
from redis_servers import run_on_empty_store, running_server, server_binaries

State = generation_pb2.RequestState


@pytest.fixture(scope="module", params=sorted(server_binaries()))
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    with running_server(request.param) as server:
        yield server.url


def record(name: str) -> generation_pb2.RequestRecord:
    return generation_pb2.RequestRecord(request_id=name, model="emoji")


def picture(data: bytes) -> ResultFile:
    return ResultFile(generation_pb2.FileHeader(count=1, byte_size=len(data)), [data])


def test_a_late_write_of_the_owner_before_is_refused(url: str) -> None:
    async def story(redis: Redis) -> None:
        old = RequestStore(redis, owner="old")
        await old.admit(record("r"), submission=b"how to run it", idempotency_key="k")
        await redis.set("fleet:coordinator:old", "1")
        heir = Leases(redis, "heir")
        assert await heir.take_over("emoji") == []  # the owner lives
        await redis.delete("fleet:coordinator:old")
        assert await Leases(redis, "old").take_over("emoji") == []  # one's own requests are no orphans
        (inherited,) = await heir.take_over("emoji")
        assert (inherited.record.request_id, inherited.epoch, inherited.submission) == ("r", 2, b"how to run it")
        assert not inherited.cancel_requested
        await redis.set("fleet:coordinator:heir", "1")
        assert await Leases(redis, "third").take_over("emoji") == []

        await redis.set("fleet:coordinator:old", "1")  # it was only asleep
        assert await old.append("r", [state_event(State.REQUEST_STATE_RUNNING)]) is None
        assert await old.finish("r", State.REQUEST_STATE_SUCCEEDED, files=[picture(b"old")]) is None
        assert await Leases(redis, "old").count_death("r", 1) == 0
        assert not await Leases(redis, "old").save_checkpoint("r", 1, 0, [b"x"])
        assert (await old.get("r")).state == State.REQUEST_STATE_QUEUED

        new = RequestStore(redis, owner="heir")
        assert await new.finish("r", State.REQUEST_STATE_SUCCEEDED, files=[picture(b"new")], epoch=2)
        assert await old.finish("r", State.REQUEST_STATE_SUCCEEDED, files=[picture(b"old")]) is None
        assert b"".join([chunk async for chunk in new.result_chunks("r", 0, 3)]) == b"new"
        assert not await redis.hexists("fleet:request:r", "submission")
        assert await heir.take_over("emoji") == []
        for key in await redis.keys("fleet:re*:*"):
            assert await redis.pttl(key) > 0, key

    run_on_empty_store(url, story)


def test_a_cancel_and_deaths_are_inherited(url: str) -> None:
    async def story(redis: Redis) -> None:
        store = RequestStore(redis, owner="old")
        await store.admit(record("r"))
        await redis.set("fleet:coordinator:old", "1")
        await store.request_cancel("r")
        old = Leases(redis, "old")
        assert [await old.count_death("r", 1), await old.count_death("r", 1)] == [1, 2]
        await redis.delete("fleet:coordinator:old")
        (inherited,) = await Leases(redis, "heir").take_over("emoji")
        assert inherited.cancel_requested
        assert inherited.deaths == 2

    run_on_empty_store(url, story)


def test_the_newest_checkpoint_stays_until_the_request_ends(url: str) -> None:
    async def story(redis: Redis) -> None:
        store = RequestStore(redis, owner="old")
        await store.admit(record("r"))
        old = Leases(redis, "old")
        with pytest.raises(NotFound):
            await old.load_checkpoint("r")
        parts = [b"head", *(bytes([n]) * 1_000_000 for n in range(20))]
        assert await old.save_checkpoint("r", 1, 0, [b"first"])
        assert await old.save_checkpoint("r", 1, 1, iter(parts))
        assert await Leases(redis, "heir").load_checkpoint("r") == parts
        (key,) = await redis.keys("fleet:checkpoint:*")
        assert await redis.pttl(key) > 0
        await store.finish("r", State.REQUEST_STATE_FAILED)
        assert not await redis.keys("fleet:checkpoint:*")

    run_on_empty_store(url, story)
