"""Hand-over in the store: free worker slots of equal workers, queue order, and refused workers."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from common.errors import FailedPrecondition
from common.state.worker_slots import QueuePriority
from redis_servers import run_on_empty_store
from slot_claims import queued, registry_of, slots_of, worker


def test_free_worker_slots_of_equal_workers_are_counted(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        leaving = worker("a", numerics="n1")
        for each in (leaving, worker("b", capacity=2, numerics="n1"), worker("c", numerics="n2"), worker("d")):
            await registry.announce(each)
        assert await registry.free_slots(leaving) == 3
        await registry.withdraw("a")
        assert await registry.free_slots(leaving) == 2
        assert await registry.free_slots(worker("d")) == 0, "no worker is equal to a worker without a fingerprint"
        async with slots_of(redis, "one") as slots:
            held = [await slots.claim("emoji", "denoising", str(number), equal_to="n1") for number in range(2)]
            assert [each.worker.worker_id for each in held] == ["b", "b"]
            assert await registry.free_slots(leaving) == 0
            slots.release(held[0])
            await slots.settle()
            assert await registry.free_slots(leaving) == 1
        for name in "bcd":
            await registry.withdraw(name)

    run_on_empty_store(each_store_url, scenario)


def test_a_handed_over_request_is_the_first_of_its_priority(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        await registry.announce(worker("w"))
        async with slots_of(redis, "one") as slots:
            order: list[str] = []

            async def take(name: str, priority: QueuePriority, *, first: bool = False) -> None:
                slot = await slots.claim("emoji", "denoising", name, priority, first=first)
                order.append(name)
                slots.release(slot)

            held = await slots.claim("emoji", "denoising", "held")
            claims = [
                ("due", QueuePriority(0, 1, "ann"), False),
                ("idle caller", QueuePriority(0, 0, "bob"), False),
                ("handed over", QueuePriority(0, 0, "zoe", cost=9), True),
                ("urgent", QueuePriority(1, 0, "ann"), False),
            ]
            waiting = []
            for number, (name, priority, first) in enumerate(claims, 1):
                waiting.append(asyncio.create_task(take(name, priority, first=first)))
                await queued(registry, number)
            slots.release(held)
            await asyncio.gather(*waiting)
            assert order == ["urgent", "handed over", "due", "idle caller"]
        await registry.withdraw("w")

    run_on_empty_store(each_store_url, scenario)


def test_a_claim_waits_while_a_worker_that_can_resume_its_step_checkpoint_lives(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        await registry.announce(worker("busy", numerics="n1"))
        async with slots_of(redis, "one", ask_again_seconds=0.05) as slots:
            held = await slots.claim("emoji", "denoising", "held")
            await registry.announce(worker("other", numerics="n2"))
            waiting = asyncio.create_task(slots.claim("emoji", "denoising", "resumes", first=True, equal_to="n1"))
            await queued(registry, 1)
            plain = await slots.claim("emoji", "denoising", "plain")
            assert plain.worker.worker_id == "other", "a claim that waits for another worker blocks no other claim"
            slots.release(held)
            resumed = await waiting
            assert resumed.worker.worker_id == "busy"
            slots.release(plain)
            await slots.settle()
            waiting = asyncio.create_task(slots.claim("emoji", "denoising", "restarts", first=True, equal_to="n1"))
            await queued(registry, 1)
            await registry.withdraw("busy")
            assert (await waiting).worker.worker_id == "other"
        await registry.withdraw("other")

    run_on_empty_store(each_store_url, scenario)


def test_refusals_are_bounded_in_number_and_time(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        await registry.declare("emoji", "f")
        assert not await registry.refusals("emoji")
        for number in range(20):
            with pytest.raises(FailedPrecondition):
                await registry.announce(worker(f"w{number}", fingerprint=f"g{number:02}"))
        refused = await registry.refusals("emoji")
        assert len(refused) == await redis.hlen("fleet:refused:emoji") == 16
        newest = next(each for each in refused if each.model_fingerprint == "g19")
        assert newest.worker_id == "w19"
        assert "fingerprint f, this checkpoint has g19" in newest.reason
        assert 0 < await redis.pttl("fleet:refused:emoji") <= 600_000
        await redis.hset("fleet:refused:emoji", "denoising|old", "1|w|long ago")
        assert "old" not in [each.model_fingerprint for each in await registry.refusals("emoji")]
        assert await redis.hlen("fleet:refused:emoji") == 16

    run_on_empty_store(each_store_url, scenario)
