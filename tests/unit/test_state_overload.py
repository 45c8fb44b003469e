"""The bound on open work: in seconds, by the pace of unlike requests, and with room for each caller's part."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis

from common.errors import ResourceExhausted
from common.state.connection import command
from common.state.presence import Presence
from common.state.requests import AdmissionLimits, RequestStore
from common.state.worker_slots import QueuePriority, WorkerSlot, WorkerSlots
from common.state.workers import WorkerRegistry
from fleet.v1 import generation_pb2, worker_pb2
from redis_servers import run_on_empty_store

State = generation_pb2.RequestState
LIMITS = AdmissionLimits(services=("text_encoding", "denoising"), queue_seconds=5.0)


class Door:
    """A store that admits, and slots of its services: two workers' places to denoise, one to encode."""

    def __init__(self, redis: Redis, slots: WorkerSlots) -> None:
        self.redis = redis
        self.store = RequestStore(redis, owner="me")
        self.slots = slots

    async def admit(
        self, name: str = "", *, cost: int = 1, caller: str = "", limits: AdmissionLimits = LIMITS, variant: str = ""
    ) -> str:
        """Admit a request of that cost at the denoiser; returns its name."""
        name = name or secrets.token_hex(8)
        record = generation_pb2.RequestRecord(request_id=name, model="emoji", caller=caller, variant=variant)
        return (await self.store.admit(record, limits=limits, costs={"denoising": cost})).record.request_id

    async def refused(
        self, words: str, *, cost: int = 1, caller: str = "", limits: AdmissionLimits = LIMITS, variant: str = ""
    ) -> float | None:
        """The seconds after which a refused request may come again."""
        with pytest.raises(ResourceExhausted, match=words) as caught:
            await self.admit(cost=cost, caller=caller, limits=limits, variant=variant)
        return caught.value.retry_seconds

    async def claim(self, name: str, cost: int = 1, service: str = "denoising") -> WorkerSlot:
        """A slot for a request."""
        return await self.slots.claim("emoji", service, name, QueuePriority(cost=cost))

    async def took(self, seconds: float, cost: int = 1, *, name: str = "x", service: str = "denoising") -> None:
        """A request of that cost held a slot for so long, and the service is done with it."""
        self.slots.release(await self.claim(name, cost, service), used_seconds=seconds)
        await self.slots.settle()


@asynccontextmanager
async def door(redis: Redis) -> AsyncIterator[Door]:
    registry = WorkerRegistry(redis)
    for service, capacity in {"text_encoding": 1, "denoising": 2}.items():
        info = worker_pb2.WorkerInfo(
            worker_id=service, model="emoji", service=service, capacity=capacity, model_fingerprint="f"
        )
        await registry.announce(info)
    presence = Presence(redis, "me")
    await presence.start()
    slots = WorkerSlots(redis, presence)
    yield Door(redis, slots)
    await slots.settle()
    await presence.stop()
    for service in ("text_encoding", "denoising"):
        await registry.withdraw(service)


async def nothing_is_open(redis: Redis) -> bool:
    return await redis.keys("fleet:work:*") + await redis.keys("fleet:open*") == []


def test_work_beyond_the_bound_is_refused_with_the_time_to_wait(each_store_url: str) -> None:
    async def story(redis: Redis) -> None:
        async with door(redis) as fleet:
            await fleet.took(4.0)
            await fleet.took(0.1, service="text_encoding")
            names = [await fleet.admit() for _ in range(3)]  # 0, 2 and 4 seconds of work before them
            assert await fleet.refused(r"6\.0 s of work") == pytest.approx(1.0)
            crowded = AdmissionLimits(LIMITS.services, max_open=3)
            assert await fleet.refused("3 requests", limits=crowded) == pytest.approx(2.0)
            await fleet.store.finish(names[0], State.REQUEST_STATE_CANCELLED)
            names.append(await fleet.admit())
            for name in names:
                await fleet.store.finish(name, State.REQUEST_STATE_CANCELLED)
            assert await nothing_is_open(redis)

    run_on_empty_store(each_store_url, story)


def test_unlike_requests_count_by_their_cost(each_store_url: str) -> None:
    async def story(redis: Redis) -> None:
        async with door(redis) as fleet:
            await fleet.took(8.0, cost=80)
            await fleet.took(0.5, cost=5)  # the pace is the same, however small the request was
            await fleet.took(0.1, service="text_encoding")
            video = await fleet.admit(cost=110)  # 11 s on two places
            assert await fleet.refused(r"5\.5 s of work") == pytest.approx(0.5)
            crowded = AdmissionLimits(LIMITS.services, max_open=1)
            assert await fleet.refused("1 requests", cost=40, limits=crowded) == pytest.approx(2.0)
            await fleet.store.finish(video, State.REQUEST_STATE_CANCELLED)
            for _ in range(10):  # 0.5 s each
                await fleet.admit(cost=10)

    run_on_empty_store(each_store_url, story)


def test_what_a_service_has_done_is_its_work_no_more(each_store_url: str) -> None:
    async def story(redis: Redis) -> None:
        async with door(redis) as fleet:
            await fleet.took(4.0)
            await fleet.took(2.0, service="text_encoding")
            for number in range(3):  # the encoder, which has one place, has 6 s to do
                await fleet.admit(f"r{number}")
            assert await fleet.refused(r"6\.0 s of work") == pytest.approx(1.0)
            for _ in range(2):  # a stage that is done twice, after a take-over, counts once
                await fleet.took(2.0, name="r0", service="text_encoding")
            assert await fleet.refused(r"6\.0 s of work") == pytest.approx(1.0)  # now the denoiser's
            await fleet.took(4.0, name="r0")
            await fleet.admit("r3")
            for number in range(4):
                await fleet.store.finish(f"r{number}", State.REQUEST_STATE_SUCCEEDED)
            assert await nothing_is_open(redis)

    run_on_empty_store(each_store_url, story)


def test_the_work_that_is_under_way_gets_less_with_time(each_store_url: str) -> None:
    async def story(redis: Redis) -> None:
        async with door(redis) as fleet:
            await fleet.took(60.0)
            await fleet.took(0.1, service="text_encoding")
            await fleet.admit("running")
            slot = await fleet.claim("running")
            wait = await fleet.refused("s of work")
            assert wait is not None
            assert 20 < wait <= 25
            held = (await command(redis, "HGET", "fleet:slots:emoji/denoising", slot.ticket)).decode()
            place, _, since = held.rpartition("|")
            earlier = f"{place}|{int(since) - 55_000}"  # 5 s are left of it, on two places
            await command(redis, "HSET", "fleet:slots:emoji/denoising", slot.ticket, earlier)
            await fleet.admit()
            fleet.slots.release(slot)

    run_on_empty_store(each_store_url, story)


def test_before_there_is_a_pace_only_what_begins_at_once_is_taken(each_store_url: str) -> None:
    async def story(redis: Redis) -> None:
        async with door(redis) as fleet:
            await fleet.took(0.1, service="text_encoding")
            first = await fleet.admit()
            await fleet.admit()
            assert await fleet.refused("2 requests for emoji are open, and none has ended") == 5.0
            await fleet.admit(
                limits=AdmissionLimits(LIMITS.services)
            )  # without a bound in seconds there is nothing to know
            await fleet.took(1.0, name=first)
            await fleet.admit()

    run_on_empty_store(each_store_url, story)


def test_a_caller_has_room_for_its_part_whatever_the_others_have(each_store_url: str) -> None:
    async def story(redis: Redis) -> None:
        async with door(redis) as fleet:
            await fleet.took(2.0)
            await fleet.took(0.1, service="text_encoding")
            for _ in range(6):  # a second each
                await fleet.admit(caller="greedy")
            assert await fleet.refused("6.0 s of work", caller="greedy") == pytest.approx(1.0)
            for _ in range(3):  # until it has more than half of the five seconds
                await fleet.admit(caller="modest")
            assert await fleet.refused("9.0 s of work", caller="modest") == pytest.approx(4.0)
            await fleet.admit(caller="third")

    run_on_empty_store(each_store_url, story)


def test_each_variant_has_a_pace_of_its_own(each_store_url: str) -> None:
    async def story(redis: Redis) -> None:
        async with door(redis) as fleet:
            await fleet.took(0.1, service="text_encoding")
            for variant, seconds in {"text": 1.0, "image": 8.0}.items():
                name = await fleet.admit(variant=variant, limits=AdmissionLimits(LIMITS.services))
                await fleet.took(seconds, name=name)
                await fleet.store.finish(name, State.REQUEST_STATE_SUCCEEDED)
            for _ in range(2):  # 0.5 s each, as two requests are taken at a time
                await fleet.admit(variant="text")
            await fleet.admit(variant="image")  # 4 s
            await fleet.admit(variant="text")
            assert await fleet.refused(r"5\.5 s of work", variant="text") == pytest.approx(0.5)
            assert await fleet.refused(r"5\.5 s of work", variant="image") == pytest.approx(0.5)
            crowded = AdmissionLimits(LIMITS.services, max_open=4)
            assert await fleet.refused("4 requests", limits=crowded, variant="image") == pytest.approx(4.0)
            assert await fleet.refused("4 requests", limits=crowded, variant="text") == pytest.approx(0.5)

    run_on_empty_store(each_store_url, story)


def test_a_variant_without_a_pace_takes_that_of_the_others(each_store_url: str) -> None:
    async def story(redis: Redis) -> None:
        async with door(redis) as fleet:
            await fleet.took(0.1, service="text_encoding")
            name = await fleet.admit(variant="text", limits=AdmissionLimits(LIMITS.services))
            await fleet.took(4.0, name=name)
            await fleet.store.finish(name, State.REQUEST_STATE_SUCCEEDED)
            for _ in range(3):
                await fleet.admit(variant="image")
            assert await fleet.refused(r"6\.0 s of work", variant="image") == pytest.approx(1.0)

    run_on_empty_store(each_store_url, story)


def test_work_of_a_callers_variants_is_one_part(each_store_url: str) -> None:
    async def story(redis: Redis) -> None:
        async with door(redis) as fleet:
            await fleet.took(4.0)
            await fleet.took(0.1, service="text_encoding")
            names = [
                await fleet.admit(caller=caller, variant=variant, limits=AdmissionLimits(LIMITS.services))
                for caller in ("ann", "bob")
                for variant in ("text", "image")
            ]
            assert sorted(await redis.hkeys("fleet:work:emoji/denoising")) == [
                b"ann|image",
                b"ann|text",
                b"bob|image",
                b"bob|text",
            ]
            # 8 s, of which each caller has 4, more than an equal part of the bound; a new caller has none.
            await fleet.refused(r"8\.0 s of work", caller="ann", variant="text")
            names.append(await fleet.admit(caller="cid", variant="text"))
            for name in names:
                await fleet.store.finish(name, State.REQUEST_STATE_CANCELLED)
            assert await nothing_is_open(redis)

    run_on_empty_store(each_store_url, story)
