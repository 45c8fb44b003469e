"""Take-over of requests against real servers: fencing, step checkpoints, cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
from redis.asyncio import Redis

from common.errors import NotFound
from common.state import leases
from common.state.connection import run_script
from common.state.leases import Inherited, Leases
from common.state.records import ResultFile, state_event
from common.state.requests import RequestStore
from fleet.v1 import generation_pb2
from redis_servers import run_on_empty_store

State = generation_pb2.RequestState


def record(name: str) -> generation_pb2.RequestRecord:
    return generation_pb2.RequestRecord(request_id=name, model="emoji")


def image_file(data: bytes) -> ResultFile:
    return ResultFile(generation_pb2.FileHeader(count=1, byte_size=len(data)), [data])


async def take_over(leases: Leases, *running: str, beyond_own: bool = True) -> list[Inherited]:
    return (await leases.take_over("emoji", running=running, beyond_own=beyond_own))[0]


def test_a_late_write_of_a_former_owner_is_refused(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        old = RequestStore(redis, owner="old")
        await old.admit(record("r"), submission=b"how to run it", idempotency_key="k")
        await redis.set("fleet:coordinator:old", "1")
        successor = Leases(redis, "successor")
        await redis.set("fleet:coordinator:successor", "1")
        assert await take_over(successor) == []  # the owner lives
        await redis.delete("fleet:coordinator:old")
        assert await take_over(successor, beyond_own=False) == []
        (inherited,) = await take_over(successor)
        assert (inherited.record.request_id, inherited.epoch, inherited.submission) == ("r", 2, b"how to run it")
        assert not inherited.cancel_requested
        await redis.set("fleet:coordinator:third", "1")
        assert await take_over(Leases(redis, "third")) == []

        await redis.set("fleet:coordinator:old", "1")  # the former owner was only suspended
        assert await old.append("r", [state_event(State.REQUEST_STATE_RUNNING)], number=0) is None
        assert await old.finish("r", State.REQUEST_STATE_SUCCEEDED, files=[image_file(b"old")]) is None
        assert not await Leases(redis, "old").add_death("r", 1, "w", service="denoising", stage=2, ttl_seconds=1.0)
        assert not await Leases(redis, "old").save_step_checkpoint("r", 1, 0, [b"x"], step=1)
        assert (await old.get("r")).state == State.REQUEST_STATE_QUEUED

        new = RequestStore(redis, owner="successor")
        assert await new.finish("r", State.REQUEST_STATE_SUCCEEDED, files=[image_file(b"new")], epoch=2)
        assert await old.finish("r", State.REQUEST_STATE_SUCCEEDED, files=[image_file(b"old")]) is None
        assert b"".join([chunk async for chunk in new.result_chunks("r", 0, 3)]) == b"new"
        assert not await redis.hexists("fleet:request:r", "submission")
        assert await take_over(successor) == []
        for key in await redis.keys("fleet:re*:*"):
            assert await redis.pttl(key) > 0, key

    run_on_empty_store(each_store_url, scenario)


def test_a_cancellation_is_inherited(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis, owner="old")
        await store.admit(record("r"))
        await redis.set("fleet:coordinator:old", "1")
        await store.request_cancel("r")
        await redis.delete("fleet:coordinator:old")
        await redis.set("fleet:coordinator:successor", "1")
        (inherited,) = await take_over(Leases(redis, "successor"))
        assert inherited.cancel_requested

    run_on_empty_store(each_store_url, scenario)


def test_a_coordinator_takes_over_its_own_requests_that_it_does_not_run(each_store_url: str) -> None:
    """A lost reply to an admission or a take-over may leave a request that its owner does not run."""

    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis, owner="me")
        await redis.set("fleet:coordinator:me", "1")
        for name in ("runs", "lost"):
            await store.admit(record(name))
        me = Leases(redis, "me")
        assert await take_over(me, "runs", "lost") == []
        (inherited,) = await take_over(me, "runs", beyond_own=False)
        assert (inherited.record.request_id, inherited.epoch) == ("lost", 2)
        (again,) = await take_over(me, "runs")
        assert (again.record.request_id, again.epoch) == ("lost", 3)
        await store.finish("lost", State.REQUEST_STATE_SUCCEEDED, epoch=3)
        assert await take_over(me, "runs") == []

    run_on_empty_store(each_store_url, scenario)


def test_a_coordinator_without_a_heartbeat_takes_over_nothing(each_store_url: str) -> None:
    """Otherwise two such coordinators would take over the same requests from each other in turn."""

    async def scenario(redis: Redis) -> None:
        await RequestStore(redis, owner="dead").admit(record("r"))
        assert await take_over(Leases(redis, "successor")) == []
        await redis.set("fleet:coordinator:successor", "1")
        assert len(await take_over(Leases(redis, "successor"))) == 1

    run_on_empty_store(each_store_url, scenario)


def test_a_cancellation_whose_message_was_lost_is_found(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis, owner="me")
        await redis.set("fleet:coordinator:me", "1")
        await store.admit(record("r"))
        await store.admit(record("other"))
        await store.request_cancel("r")
        for _ in range(2):  # the cancellation is reported until the request ends
            assert await Leases(redis, "me").take_over("emoji", running=("r", "other")) == ([], ["r"])
        await store.finish("r", State.REQUEST_STATE_CANCELLED)
        assert await Leases(redis, "me").take_over("emoji", running=("other",)) == ([], [])

    run_on_empty_store(each_store_url, scenario)


def test_event_numbers_of_the_next_owner_start_at_zero(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        old, new = RequestStore(redis, owner="old"), RequestStore(redis, owner="successor")
        await old.admit(record("r"))
        running = [state_event(State.REQUEST_STATE_RUNNING)]
        assert await old.append("r", running, number=0)
        await redis.set("fleet:coordinator:successor", "1")
        assert len(await take_over(Leases(redis, "successor"))) == 1
        assert await old.append("r", running, number=0) is None
        assert len(await new.append("r", running, number=0, epoch=2) or ()) == 1

    run_on_empty_store(each_store_url, scenario)


def test_the_newest_step_checkpoint_stays_until_the_request_ends(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        store = RequestStore(redis, owner="old")
        await store.admit(record("r"))
        old = Leases(redis, "old")
        with pytest.raises(NotFound):
            await old.load_step_checkpoint("r")
        parts = [b"head", *(bytes([n]) * 1_000_000 for n in range(20))]
        assert await old.save_step_checkpoint("r", 1, 0, [b"first"], step=1)
        assert await old.save_step_checkpoint("r", 1, 1, iter(parts), step=2)
        assert await Leases(redis, "successor").load_step_checkpoint("r") == parts
        (key,) = await redis.keys("fleet:checkpoint:*")
        assert await redis.pttl(key) > 0
        # This write arrives late, after its caller stopped waiting for the reply.
        assert not await old.save_step_checkpoint("r", 1, 0, [b"first"], step=1)
        assert await redis.keys("fleet:checkpoint:*") == [key]
        assert await old.load_step_checkpoint("r") == parts
        await store.finish("r", State.REQUEST_STATE_FAILED)
        assert not await redis.keys("fleet:checkpoint:*")

    run_on_empty_store(each_store_url, scenario)


@pytest.mark.parametrize("has_ended", [False, True], ids=["running", "ended"])
@pytest.mark.parametrize("phase", ["writing", "entering"])
def test_a_cancelled_save_of_a_step_checkpoint_leaves_no_key_behind(
    each_store_url: str, monkeypatch: pytest.MonkeyPatch, phase: str, has_ended: bool
) -> None:
    """A completely written step checkpoint is entered in the record of a running request. Other keys are deleted."""

    async def scenario(redis: Redis) -> None:
        store, old = RequestStore(redis, owner="old"), Leases(redis, "old")
        await store.admit(record("r"))
        assert await old.save_step_checkpoint("r", 1, 0, [b"first"], step=1)
        put, reached = old._put, asyncio.Event()
        monkeypatch.setattr(leases, "_BATCH_BYTES", 1)

        async def wait_forever(*_: object) -> None:
            monkeypatch.setattr(leases, "run_script", run_script)
            reached.set()
            await asyncio.Event().wait()

        async def put_once(key: str, parts: Mapping[str, bytes]) -> None:
            await put(key, parts)
            monkeypatch.setattr(old, "_put", wait_forever)

        if phase == "writing":
            monkeypatch.setattr(old, "_put", put_once)
        else:
            monkeypatch.setattr(leases, "run_script", wait_forever)
        saving = asyncio.create_task(old.save_step_checkpoint("r", 1, 1, [b"second", b"third"], step=2))
        await reached.wait()
        assert b"fleet:checkpoint:r:1-1" in await redis.keys("fleet:checkpoint:*")
        if has_ended:
            await store.finish("r", State.REQUEST_STATE_CANCELLED)
        saving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await saving
        newest = f"fleet:checkpoint:r:1-{int(phase == 'entering')}".encode()
        assert await redis.keys("fleet:checkpoint:*") == ([] if has_ended else [newest])

    run_on_empty_store(each_store_url, scenario)
