"""The bound on open work in seconds, by cost and measured pace, with a share for each caller."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis.asyncio import Redis

from common.errors import ResourceExhausted
from common.state.connection import command
from common.state.requests import AdmissionLimits, RequestStore
from common.state.worker_slots import QueuePriority, WorkerSlot, WorkerSlots
from fleet.v1 import generation_pb2, worker_pb2
from redis_servers import run_on_empty_store
from slot_claims import presence_of, registry_of

State = generation_pb2.RequestState
LIMITS = AdmissionLimits(services=("text_encoding", "denoising"), queue_seconds=5.0)


class AdmittingFleet:
    """A request store, and workers with two worker slots of denoising and one of text encoding."""

    def __init__(self, redis: Redis, slots: WorkerSlots) -> None:
        self.redis = redis
        self.store = RequestStore(redis, owner="me")
        self.slots = slots

    async def admit(
        self, name: str = "", *, cost: int = 1, caller: str = "", limits: AdmissionLimits = LIMITS, variant: str = ""
    ) -> str:
        """Admit a request with this cost of denoising. Returns its ID."""
        name = name or secrets.token_hex(8)
        record = generation_pb2.RequestRecord(request_id=name, model="emoji", caller=caller, variant=variant)
        return (await self.store.admit(record, limits=limits, costs={"denoising": cost})).record.request_id

    async def refused(
        self, message: str, *, cost: int = 1, caller: str = "", limits: AdmissionLimits = LIMITS, variant: str = ""
    ) -> float | None:
        """Check that a request is refused. Returns the seconds after which to retry."""
        with pytest.raises(ResourceExhausted, match=message) as caught:
            await self.admit(cost=cost, caller=caller, limits=limits, variant=variant)
        return caught.value.retry_seconds

    async def claim(self, name: str, cost: int = 1, service: str = "denoising") -> WorkerSlot:
        """Claim a worker slot for a request."""
        return await self.slots.claim("emoji", service, name, QueuePriority(cost=cost))

    async def measure(self, seconds: float, cost: int = 1, *, name: str = "x", service: str = "denoising") -> None:
        """Run a stage of this cost to its end, with a worker slot held for `seconds`."""
        self.slots.release(await self.claim(name, cost, service), used_seconds=seconds)
        await self.slots.settle()


@asynccontextmanager
async def admitting_fleet(redis: Redis) -> AsyncIterator[AdmittingFleet]:
    registry = registry_of(redis)
    for service, capacity in {"text_encoding": 1, "denoising": 2}.items():
        info = worker_pb2.WorkerInfo(
            worker_id=service, model="emoji", service=service, capacity=capacity, model_fingerprint="f"
        )
        await registry.announce(info)
    presence = presence_of(redis, "me")
    await presence.start()
    slots = WorkerSlots(redis, presence)
    yield AdmittingFleet(redis, slots)
    await slots.settle()
    await presence.stop()
    for service in ("text_encoding", "denoising"):
        await registry.withdraw(service)


async def nothing_is_open(redis: Redis) -> bool:
    return await redis.keys("fleet:work:*") + await redis.keys("fleet:open*") == []


def test_work_beyond_the_bound_is_refused_with_the_time_to_wait(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        async with admitting_fleet(redis) as fleet:
            await fleet.measure(4.0)
            await fleet.measure(0.1, service="text_encoding")
            names = [await fleet.admit() for _ in range(3)]  # with 0, 2 and 4 s of work ahead
            assert await fleet.refused(r"6\.0 s of work") == pytest.approx(1.0)
            crowded = AdmissionLimits(LIMITS.services, max_open=3)
            assert await fleet.refused("3 requests", limits=crowded) == pytest.approx(2.0)
            await fleet.store.finish(names[0], State.REQUEST_STATE_CANCELLED)
            names.append(await fleet.admit())
            for name in names:
                await fleet.store.finish(name, State.REQUEST_STATE_CANCELLED)
            assert await nothing_is_open(redis)

    run_on_empty_store(each_store_url, scenario)


def test_unlike_requests_count_by_their_cost(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        async with admitting_fleet(redis) as fleet:
            await fleet.measure(8.0, cost=80)
            await fleet.measure(0.5, cost=5)  # the pace per unit of cost is the same
            await fleet.measure(0.1, service="text_encoding")
            video = await fleet.admit(cost=110)  # 11 s on two worker slots
            assert await fleet.refused(r"5\.5 s of work") == pytest.approx(0.5)
            crowded = AdmissionLimits(LIMITS.services, max_open=1)
            assert await fleet.refused("1 requests", cost=40, limits=crowded) == pytest.approx(2.0)
            await fleet.store.finish(video, State.REQUEST_STATE_CANCELLED)
            for _ in range(10):  # 0.5 s each
                await fleet.admit(cost=10)

    run_on_empty_store(each_store_url, scenario)


def test_completed_stages_do_not_count_as_open_work(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        async with admitting_fleet(redis) as fleet:
            await fleet.measure(4.0)
            await fleet.measure(2.0, service="text_encoding")
            for number in range(3):  # 6 s of work on the only worker slot of text encoding
                await fleet.admit(f"r{number}")
            assert await fleet.refused(r"6\.0 s of work") == pytest.approx(1.0)
            for _ in range(2):  # a stage that completes twice, after a take-over, counts once
                await fleet.measure(2.0, name="r0", service="text_encoding")
            assert await fleet.refused(r"6\.0 s of work") == pytest.approx(1.0)  # work of denoising
            await fleet.measure(4.0, name="r0")
            await fleet.admit("r3")
            for number in range(4):
                await fleet.store.finish(f"r{number}", State.REQUEST_STATE_SUCCEEDED)
            assert await nothing_is_open(redis)

    run_on_empty_store(each_store_url, scenario)


def test_running_work_decreases_with_time(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        async with admitting_fleet(redis) as fleet:
            await fleet.measure(60.0)
            await fleet.measure(0.1, service="text_encoding")
            await fleet.admit("running")
            slot = await fleet.claim("running")
            wait = await fleet.refused("s of work")
            assert wait is not None
            assert 20 < wait <= 25
            held = (await command(redis, "HGET", "fleet:slots:emoji/denoising", slot.ticket)).decode()
            prefix, _, since = held.rpartition("|")
            earlier = f"{prefix}|{int(since) - 55_000}"  # 5 s remain, on two worker slots
            await command(redis, "HSET", "fleet:slots:emoji/denoising", slot.ticket, earlier)
            await fleet.admit()
            fleet.slots.release(slot)

    run_on_empty_store(each_store_url, scenario)


def test_without_a_pace_only_requests_that_start_at_once_are_admitted(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        async with admitting_fleet(redis) as fleet:
            await fleet.measure(0.1, service="text_encoding")
            first = await fleet.admit()
            await fleet.admit()
            assert await fleet.refused("2 requests for emoji are open, and none has ended") == 5.0
            # Admission without a bound in seconds needs no pace.
            await fleet.admit(limits=AdmissionLimits(LIMITS.services))
            await fleet.measure(1.0, name=first)
            await fleet.admit()

    run_on_empty_store(each_store_url, scenario)


def test_a_caller_within_its_share_is_admitted_whatever_other_callers_have_open(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        async with admitting_fleet(redis) as fleet:
            await fleet.measure(2.0)
            await fleet.measure(0.1, service="text_encoding")
            for _ in range(6):  # 1 s each
                await fleet.admit(caller="greedy")
            assert await fleet.refused("6.0 s of work", caller="greedy") == pytest.approx(1.0)
            for _ in range(3):  # until the work of the caller exceeds half of the bound of 5 s
                await fleet.admit(caller="modest")
            assert await fleet.refused("9.0 s of work", caller="modest") == pytest.approx(4.0)
            await fleet.admit(caller="third")

    run_on_empty_store(each_store_url, scenario)


def test_each_variant_has_its_own_pace(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        async with admitting_fleet(redis) as fleet:
            await fleet.measure(0.1, service="text_encoding")
            for variant, seconds in {"text": 1.0, "image": 8.0}.items():
                name = await fleet.admit(variant=variant, limits=AdmissionLimits(LIMITS.services))
                await fleet.measure(seconds, name=name)
                await fleet.store.finish(name, State.REQUEST_STATE_SUCCEEDED)
            for _ in range(2):  # 0.5 s each, on two worker slots
                await fleet.admit(variant="text")
            await fleet.admit(variant="image")  # 4 s
            await fleet.admit(variant="text")
            assert await fleet.refused(r"5\.5 s of work", variant="text") == pytest.approx(0.5)
            assert await fleet.refused(r"5\.5 s of work", variant="image") == pytest.approx(0.5)
            crowded = AdmissionLimits(LIMITS.services, max_open=4)
            assert await fleet.refused("4 requests", limits=crowded, variant="image") == pytest.approx(4.0)
            assert await fleet.refused("4 requests", limits=crowded, variant="text") == pytest.approx(0.5)

    run_on_empty_store(each_store_url, scenario)


def test_a_variant_without_a_pace_has_the_pace_of_the_other_variants(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        async with admitting_fleet(redis) as fleet:
            await fleet.measure(0.1, service="text_encoding")
            name = await fleet.admit(variant="text", limits=AdmissionLimits(LIMITS.services))
            await fleet.measure(4.0, name=name)
            await fleet.store.finish(name, State.REQUEST_STATE_SUCCEEDED)
            for _ in range(3):
                await fleet.admit(variant="image")
            assert await fleet.refused(r"6\.0 s of work", variant="image") == pytest.approx(1.0)

    run_on_empty_store(each_store_url, scenario)


def test_work_of_all_variants_counts_towards_the_share_of_the_caller(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        async with admitting_fleet(redis) as fleet:
            await fleet.measure(4.0)
            await fleet.measure(0.1, service="text_encoding")
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
            # 8 s of work: 4 s of each caller, which exceeds an equal share of the bound. A new caller has no work.
            await fleet.refused(r"8\.0 s of work", caller="ann", variant="text")
            names.append(await fleet.admit(caller="cid", variant="text"))
            for name in names:
                await fleet.store.finish(name, State.REQUEST_STATE_CANCELLED)
            assert await nothing_is_open(redis)

    run_on_empty_store(each_store_url, scenario)
