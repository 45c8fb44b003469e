"""Fair queueing: callers of equal priority get equal shares of a service's work."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from redis.asyncio import Redis

from async_tests import wait_until
from common.state.worker_slots import QueuePriority, WorkerSlots
from fleet.v1 import worker_pb2
from redis_servers import run_on_empty_store
from slot_claims import SLOW, presence_of, registry_of


class ClaimQueue:
    """A worker of capacity 1 and its waiting claims; `order` has the names in the order of grants."""

    def __init__(self, redis: Redis, *coordinators: WorkerSlots) -> None:
        self.redis = redis
        self.order: list[str] = []
        self._coordinators = coordinators
        self._registry = registry_of(redis)
        self._tasks: list[asyncio.Task[None]] = []

    async def join(self, name: str, queue_priority: QueuePriority) -> None:
        """Claim a worker slot, and return once the claim waits. Claims alternate between the coordinators."""
        slots = self._coordinators[len(self._tasks) % len(self._coordinators)]
        self._tasks.append(asyncio.create_task(self._take(slots, name, queue_priority)))
        count = len(self._tasks) - len(self.order)

        async def waits() -> bool:
            return (await self._registry.load("emoji", "denoising")).queued == count

        await wait_until(waits)

    async def _take(self, slots: WorkerSlots, name: str, queue_priority: QueuePriority) -> None:
        slot = await slots.claim("emoji", "denoising", name, queue_priority)
        self.order.append(name)
        slots.release(slot)

    async def finish(self) -> list[str]:
        """Wait until all claims were granted. Returns their names in the order of grants."""
        await asyncio.gather(*self._tasks)
        order, self.order, self._tasks = self.order, [], []
        for slots in self._coordinators:
            await slots.settle()
        return order


@asynccontextmanager
async def claim_queue(redis: Redis) -> AsyncIterator[tuple[ClaimQueue, WorkerSlots]]:
    """A queue of claims of two coordinators, and the `WorkerSlots` of the first coordinator."""
    registry = registry_of(redis)
    info = worker_pb2.WorkerInfo(
        worker_id="w", service="denoising", model="emoji", model_fingerprint="f", capacity=1, address="unix:/w"
    )
    await registry.announce(info)
    one, two = presence_of(redis, "one"), presence_of(redis, "two")
    mine, others = (WorkerSlots(redis, each, ask_again_seconds=SLOW) for each in (one, two))
    await one.start()
    await two.start()
    yield ClaimQueue(redis, mine, others), mine
    await one.stop()
    await two.stop()
    await registry.withdraw("w")


def test_a_caller_with_many_requests_does_not_delay_a_caller_with_few(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        async with claim_queue(redis) as (queue, slots):
            held = await slots.claim("emoji", "denoising", "g0", QueuePriority(caller="greedy"))
            for number in range(1, 7):
                await queue.join(f"g{number}", QueuePriority(caller="greedy"))
            for number in (1, 2):
                await queue.join(f"m{number}", QueuePriority(caller="modest"))
            slots.release(held)
            assert await queue.finish() == ["m1", "g1", "m2", "g2", "g3", "g4", "g5", "g6"]
            assert await redis.keys("fleet:slots:*") + await redis.keys("fleet:waiting:*") == []
            (shares,) = await redis.keys("fleet:shares:*")
            assert await redis.pttl(shares) > 0

    run_on_empty_store(each_store_url, scenario)


def test_callers_get_equal_shares_of_work_and_not_of_requests(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        async with claim_queue(redis) as (queue, slots):
            held = await slots.claim("emoji", "denoising", "x", QueuePriority(caller="x"))
            for number in range(3):
                await queue.join(f"video {number}", QueuePriority(caller="films", cost=40))
            for number in range(8):
                await queue.join(f"icon {number}", QueuePriority(caller="icons", cost=10))
            slots.release(held)
            order = await queue.finish()
            assert order[:2] == ["video 0", "icon 0"]
            positions = [order.index(f"video {number}") for number in range(3)]
            assert [after - before - 1 for before, after in itertools.pairwise(positions)] == [4, 4]

    run_on_empty_store(each_store_url, scenario)


def test_an_idle_caller_accumulates_no_share(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        async with claim_queue(redis) as (queue, slots):
            for number in range(20):
                slots.release(await slots.claim("emoji", "denoising", f"a{number}", QueuePriority(caller="always")))
                await slots.settle()
            held = await slots.claim("emoji", "denoising", "a", QueuePriority(caller="always"))
            for number in range(3):
                await queue.join(f"always {number}", QueuePriority(caller="always"))
                await queue.join(f"seldom {number}", QueuePriority(caller="seldom"))
            slots.release(held)
            order = await queue.finish()
            assert order == [f"{name} {number}" for number in range(3) for name in ("seldom", "always")]

    run_on_empty_store(each_store_url, scenario)


def test_priorities_precede_shares_and_deadlines_order_requests_of_a_caller(each_store_url: str) -> None:
    """A deadline moves a request ahead of other requests of its caller only."""

    async def scenario(redis: Redis) -> None:
        async with claim_queue(redis) as (queue, slots):
            held = await slots.claim("emoji", "denoising", "a0", QueuePriority(caller="a"))
            soon, late = 3_000_000_000_000, 4_000_000_000_000
            for name, queue_priority in {
                "a late": QueuePriority(0, late, "a"),
                "a soon": QueuePriority(0, soon, "a"),
                "ab": QueuePriority(0, 0, "ab"),
                "b": QueuePriority(0, 0, "b|~%"),
                "a first": QueuePriority(9, 0, "a"),
                "b last": QueuePriority(-9, 1, "b|~%"),
            }.items():
                await queue.join(name, queue_priority)
            slots.release(held)
            assert await queue.finish() == ["a first", "ab", "b", "a soon", "a late", "b last"]

    run_on_empty_store(each_store_url, scenario)


def test_a_hundred_waiting_callers_take_turns(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        async with claim_queue(redis) as (queue, slots):
            held = await slots.claim("emoji", "denoising", "x", QueuePriority(caller="x"))
            for turn in range(2):
                for number in range(100):
                    await queue.join(f"{turn} of {number}", QueuePriority(caller=f"caller-{number}"))
            slots.release(held)
            assert await queue.finish() == [f"{turn} of {number}" for turn in range(2) for number in range(100)]

    run_on_empty_store(each_store_url, scenario)
