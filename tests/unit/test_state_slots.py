"""Workers and worker slots on real servers: live workers, queue order, and slots of dead processes."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from async_tests import wait_until
from common.errors import FailedPrecondition, InvalidInput
from common.state import worker_slots
from common.state.connection import Arguments, run_script
from common.state.store_server import read_repairs
from common.state.worker_slots import NoWorkers, QueuePriority, WorkerSlot, WorkerSlots
from common.state.workers import WorkerRegistry
from redis_servers import run_on_empty_store, running_server
from slot_claims import SLOW, queued, registry_of, slots_of, worker

CLAIM: Arguments = {"place": "emoji/denoising", "priority": 0, "cost": 1, "deadline": 0, "caller": "", "wiring": ""}


async def expire(redis: Redis, worker_id: str) -> None:
    """Change the store as the expiry of a worker's heartbeat does."""
    seconds, _ = await redis.time()
    await redis.zadd("fleet:workers:emoji/denoising", {worker_id: seconds * 1_000})
    await redis.delete(f"fleet:worker:{worker_id}")


def test_worker_slots_are_granted_by_priority_then_deadline_then_arrival(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        await registry.announce(worker("w"))
        async with slots_of(redis, "a") as mine, slots_of(redis, "b") as others:
            order: list[str] = []

            async def take(slots: WorkerSlots, name: str, priority: int, deadline: int) -> None:
                slot = await slots.claim("emoji", "denoising", name, QueuePriority(priority, deadline))
                order.append(name)
                slots.release(slot)

            first = await mine.claim("emoji", "denoising", "first")
            waiting = []
            for number, (slots, name, priority, deadline) in enumerate(
                [
                    (mine, "plain 1", 0, 0),
                    (others, "plain 2", 0, 0),
                    (mine, "low", -100, 1),
                    (others, "late", 0, 4_000_000_000_000),
                    (mine, "soon", 0, 3_000_000_000_000),
                    (others, "high", 100, 0),
                ],
                start=1,
            ):
                waiting.append(asyncio.create_task(take(slots, name, priority, deadline)))
                await queued(registry, number)
            mine.release(first)
            await asyncio.gather(*waiting)
            assert order == ["high", "soon", "late", "plain 1", "plain 2", "low"]
            await mine.settle()
            await others.settle()
            assert await redis.keys("fleet:slots:*") == []
            assert await redis.keys("fleet:waiting:*") == []
        await registry.withdraw("w")

    run_on_empty_store(each_store_url, scenario)


def test_claims_spread_over_workers_up_to_their_capacity(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        for info in (worker("one"), worker("two", capacity=2)):
            await registry.announce(info)
        async with slots_of(redis, "a") as slots:
            taken = await asyncio.gather(*(slots.claim("emoji", "denoising", f"r{i}") for i in range(3)))
            assert sorted(slot.worker.worker_id for slot in taken) == ["one", "two", "two"]
            load = await registry.load("emoji", "denoising")
            assert (load.capacity, load.busy, load.queued) == (3, 3, 0)
            waiting = asyncio.create_task(slots.claim("emoji", "denoising", "r3"))
            await queued(registry, 1)
            slots.release(taken[0])
            assert (await waiting).worker.worker_id == taken[0].worker.worker_id
        for name in ("one", "two"):
            await registry.withdraw(name)
        assert await registry.live("emoji", "denoising") == []

    run_on_empty_store(each_store_url, scenario)


def test_idle_workers_take_turns(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        for name in ("one", "two", "three"):
            await registry.announce(worker(name))
        async with slots_of(redis, "a") as slots:
            seen = []
            for number in range(6):
                slot = await slots.claim("emoji", "denoising", f"r{number}")
                seen.append(slot.worker.worker_id)
                slots.release(slot)
                await slots.settle()
            assert sorted(seen[:3]) == sorted(seen[3:]) == ["one", "three", "two"]
        for name in ("one", "two", "three"):
            await registry.withdraw(name)

    run_on_empty_store(each_store_url, scenario)


def test_a_new_worker_serves_waiting_claims(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        async with slots_of(redis, "a") as slots:
            waiting = asyncio.create_task(slots.claim("emoji", "denoising", "r"))
            await queued(registry, 1)
            await registry.announce(worker("w"))
            assert (await waiting).worker == worker("w")
        await registry.withdraw("w")

    run_on_empty_store(each_store_url, scenario)


def test_a_cancelled_claim_leaves_the_queue_and_holds_no_worker_slot(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        await registry.announce(worker("w"))
        async with slots_of(redis, "a") as slots:
            held = await slots.claim("emoji", "denoising", "r")
            waiting = asyncio.create_task(slots.claim("emoji", "denoising", "gone"))
            await queued(registry, 1)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await slots.settle()
            assert (await registry.load("emoji", "denoising")).queued == 0
            slots.release(held)
            await slots.settle()
            assert (await registry.load("emoji", "denoising")).busy == 0
        await registry.withdraw("w")

    run_on_empty_store(each_store_url, scenario)


def test_worker_slots_and_queue_entries_of_a_dead_coordinator_are_freed(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        await registry.announce(worker("w"))
        async with slots_of(redis, "dying") as dying, slots_of(redis, "living", ask_again_seconds=0.02) as living:
            await dying.claim("emoji", "denoising", "held")
            first = asyncio.create_task(dying.claim("emoji", "denoising", "first", QueuePriority(priority=9)))
            await queued(registry, 1)
            second = asyncio.create_task(living.claim("emoji", "denoising", "second"))
            await queued(registry, 2)
            await run_script(redis, "resign", {"owner": "dying"})  # as when its heartbeat expires
            assert (await second).worker.worker_id == "w"
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
        await registry.withdraw("w")

    run_on_empty_store(each_store_url, scenario)


def test_a_claim_waits_for_an_unavailable_store(caplog: pytest.LogCaptureFixture) -> None:
    """Each attempt sends the same ticket, so that no further claim has to be released."""

    async def has_tried_twice() -> bool:
        return sum("claim of a worker slot" in record.message for record in caplog.records) >= 2

    with running_server("valkey") as server:

        async def scenario(redis: Redis) -> None:
            registry = registry_of(redis)
            await registry.announce(worker("w"))
            async with slots_of(redis, "a") as slots:
                server.kill()
                claim = asyncio.create_task(slots.claim("emoji", "denoising", "r"))
                await wait_until(has_tried_twice)
                server.start()
                slot = await claim
                assert slot.worker.worker_id == "w"
                slots.release(slot)
            await registry.withdraw("w")

        run_on_empty_store(server.url, scenario)
    assert not [record for record in caplog.records if "release of a worker slot waits" in record.message]


def test_a_dead_worker_is_not_live_and_is_recorded_as_lost(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        fast = WorkerRegistry(redis, heartbeat_seconds=0.01, ttl_seconds=SLOW)
        silent = registry_of(redis)
        await fast.announce(worker("alive"))
        await silent.announce(worker("dead"))
        assert len(await fast.live("emoji", "denoising")) == 2
        seconds, _ = await redis.time()
        assert 0 < await redis.pttl("fleet:worker:dead") <= SLOW * 1_000
        expires = await redis.zscore("fleet:workers:emoji/denoising", "dead") or 0.0
        assert seconds < expires / 1_000 <= seconds + 1 + SLOW
        await expire(redis, "dead")
        assert [each.worker_id for each in await fast.live("emoji", "denoising")] == ["alive"]
        assert 0 <= await redis.pttl("fleet:workers:emoji/denoising") <= SLOW * 1_000 + 600_000
        assert await redis.zrange("fleet:lost:emoji/denoising", 0, -1) == [b"dead"]

        async def has_a_heartbeat() -> bool:
            return bool(await redis.exists("fleet:worker:alive"))

        await redis.delete("fleet:worker:alive")
        await wait_until(has_a_heartbeat)
        await fast.withdraw("alive")
        await silent.withdraw("dead")

    run_on_empty_store(each_store_url, scenario)


def test_only_the_coordinator_that_cannot_reach_a_worker_avoids_it(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        await registry.announce(worker("w", capacity=3))
        async with slots_of(redis, "a") as slots, slots_of(redis, "b") as others:
            held = await slots.claim("emoji", "denoising", "held")
            await slots.avoid("w")
            await redis.hset("fleet:avoided:a", "w", f"{2**42}|200")  # a pause that outlasts the test
            waiting = asyncio.create_task(slots.claim("emoji", "denoising", "r", QueuePriority(priority=9)))
            await queued(registry, 1)
            granted = await others.claim("emoji", "denoising", "s")  # of lower priority than the waiting claim
            assert granted.worker.worker_id == "w"
            load = await registry.load("emoji", "denoising")
            assert (len(load.workers), load.busy, load.queued) == (1, 2, 1)  # slots of both claims are counted
            await redis.hset("fleet:avoided:a", "w", "1|200")
            others.release(granted)  # the slot is granted to the waiting claim
            assert (await waiting).worker.worker_id == "w"
            slots.release(held)
        await registry.withdraw("w")

    run_on_empty_store(each_store_url, scenario)


def test_the_pause_of_an_avoided_worker_doubles_and_a_success_ends_it(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        # Heartbeats also grant slots, so none is sent during the test.
        registry = registry_of(redis)
        await registry.announce(worker("w"))
        async with slots_of(redis, "a") as slots:
            assert [await slots.avoid("w") for _ in range(7)] == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
            assert 0 < await redis.pttl("fleet:avoided:a") <= 60_000
            await redis.hset("fleet:avoided:a", "w", "1|5000")  # a pause that ended more than a minute ago
            await redis.hset("fleet:avoided:a", "long ago", "1|5000")
            assert await slots.avoid("w") == 0.2  # the first pause again
            assert await redis.hkeys("fleet:avoided:a") == [b"w"]
            await redis.hset("fleet:avoided:a", "w", "1|5000")
            lost = await slots.claim("emoji", "denoising", "r")
            slots.release(lost)
            await slots.settle()
            assert await redis.hexists("fleet:avoided:a", "w")
            slots.release(await slots.claim("emoji", "denoising", "r"), used_seconds=0.000_1)
            await slots.settle()
            assert not await redis.exists("fleet:avoided:a")
            await slots.avoid("w")
            seconds, _ = await redis.time()
            await redis.hset("fleet:avoided:a", "w", f"{seconds * 1_000 + 1_500}|200")
            # The claim is repeated when the pause ends.
            assert (await slots.claim("emoji", "denoising", "r")).worker.worker_id == "w"
        assert not await redis.exists("fleet:avoided:a")
        await registry.withdraw("w")

    run_on_empty_store(each_store_url, scenario)


def test_a_claim_goes_to_a_worker_that_is_not_avoided(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        for name in ("one", "two"):
            await registry.announce(worker(name, capacity=2))
        async with slots_of(redis, "a") as slots:
            await redis.hset("fleet:avoided:a", "one", f"{2**42}|200")
            taken = [await slots.claim("emoji", "denoising", f"r{number}") for number in range(2)]
            assert [slot.worker.worker_id for slot in taken] == ["two", "two"]
        for name in ("one", "two"):
            await registry.withdraw(name)

    run_on_empty_store(each_store_url, scenario)


def test_a_claim_for_a_whole_worker_waits_for_an_idle_worker_and_takes_all_of_its_slots(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        await registry.announce(worker("w", capacity=3))
        async with slots_of(redis, "a") as slots:
            first = [await slots.claim("emoji", "denoising", f"first {number}") for number in range(2)]
            alone = asyncio.create_task(slots.claim("emoji", "denoising", "alone", alone=True))
            await queued(registry, 1)
            later = asyncio.create_task(slots.claim("emoji", "denoising", "later"))  # one slot is free but reserved
            await queued(registry, 2)
            slots.release(first[0])
            await slots.settle()
            await queued(registry, 2)
            slots.release(first[1])
            whole = await alone
            load = await registry.load("emoji", "denoising")
            assert (load.busy, load.queued) == (3, 1)
            slots.release(whole)
            assert (await later).worker.worker_id == "w"
            assert (await registry.load("emoji", "denoising")).busy == 1
        await registry.withdraw("w")

    run_on_empty_store(each_store_url, scenario)


def test_a_claim_for_a_whole_worker_reserves_one_worker_and_no_more(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        for name in ("one", "two"):
            await registry.announce(worker(name, capacity=2))
        async with slots_of(redis, "a") as slots:
            held = [await slots.claim("emoji", "denoising", f"held {number}") for number in range(2)]
            waiting = []
            for number in range(2):  # the second claim reserves nothing
                name = f"alone {number}"
                waiting.append(asyncio.create_task(slots.claim("emoji", "denoising", name, alone=True)))
                await queued(registry, number + 1)
            served_by = []
            for number in range(4):  # the worker that is not reserved serves the other claims in sequence
                slot = await slots.claim("emoji", "denoising", f"r{number}")
                served_by.append(slot.worker.worker_id)
                slots.release(slot)
                await slots.settle()
            assert len(set(served_by)) == 1
            reserved = next(slot for slot in held if slot.worker.worker_id != served_by[0])
            slots.release(reserved)
            assert (await waiting[0]).worker.worker_id == reserved.worker.worker_id
            waiting[1].cancel()
            await asyncio.gather(waiting[1], return_exceptions=True)
        for name in ("one", "two"):
            await registry.withdraw(name)

    run_on_empty_store(each_store_url, scenario)


def test_a_reservation_ends_with_its_claim(each_store_url: str) -> None:
    """The claim is cancelled, or its coordinator dies."""

    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        await registry.announce(worker("w", capacity=2))
        async with slots_of(redis, "a") as slots, slots_of(redis, "dying") as dying:
            held = await slots.claim("emoji", "denoising", "held")
            alone = asyncio.create_task(slots.claim("emoji", "denoising", "alone", alone=True))
            await queued(registry, 1)
            later = asyncio.create_task(slots.claim("emoji", "denoising", "later"))
            await queued(registry, 2)
            alone.cancel()
            slot = await later
            slots.release(slot)
            await slots.settle()
            orphan = asyncio.create_task(dying.claim("emoji", "denoising", "orphan", alone=True))
            await queued(registry, 1)
            await run_script(redis, "resign", {"owner": "dying"})
            assert (await slots.claim("emoji", "denoising", "last")).worker.worker_id == "w"
            orphan.cancel()
            await asyncio.gather(alone, orphan, return_exceptions=True)
            slots.release(held)
        await registry.withdraw("w")

    run_on_empty_store(each_store_url, scenario)


def test_a_claim_that_arrives_after_its_cancellation_is_released(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        await registry.announce(worker("w"))
        async with slots_of(redis, "a") as slots, slots_of(redis, "b") as others:
            held = await slots.claim("emoji", "denoising", "r")
            for owner in ("a", "b"):
                await run_script(redis, "claim", {"ticket": f"late/{owner}/9", "owner": owner, **CLAIM})
            await slots.give_back_unknown("emoji", "denoising")
            await slots.settle()
            assert (await registry.load("emoji", "denoising")).queued == 1
            slots.release(held)  # the slot is granted to the cancelled claim of "b"
            await slots.settle()
            assert (await registry.load("emoji", "denoising")).busy == 1
            await others.give_back_unknown("emoji", "denoising")
            await others.settle()
            load = await registry.load("emoji", "denoising")
            assert (load.busy, load.queued) == (0, 0)
            current = await slots.claim("emoji", "denoising", "r")
            await slots.give_back_unknown("emoji", "denoising")
            await slots.settle()
            assert (await registry.load("emoji", "denoising")).busy == 1
            slots.release(current)
        await registry.withdraw("w")

    run_on_empty_store(each_store_url, scenario)


def test_a_lost_grant_of_a_dead_worker_is_not_damage(each_store_url: str) -> None:
    """While the store was unavailable, the message of the grant and the worker's heartbeats were lost."""

    async def scenario(redis: Redis) -> None:
        claim: Arguments = {"ticket": "r/me/0", "owner": "me", **CLAIM}
        await run_script(redis, "beat", {"owner": "me", "lasts": 60_000})
        registry = registry_of(redis)
        await registry.announce(worker("w"))
        assert (await run_script(redis, "claim", claim))[0] == b"granted"
        await expire(redis, "w")
        assert (await run_script(redis, "claim", claim))[0] == b"waiting"
        assert not await redis.hlen("fleet:slots:emoji/denoising")
        await registry.announce(worker("v"))
        assert (await run_script(redis, "claim", claim))[0] == b"granted"
        assert await read_repairs(redis) == {}

    run_on_empty_store(each_store_url, scenario)


def test_a_worker_slot_released_while_claims_are_read_is_not_unknown(
    each_store_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        await registry.announce(worker("w"))
        async with slots_of(redis, "a") as slots:
            held = await slots.claim("emoji", "denoising", "r")

            async def release_meanwhile(redis: Redis, operation: str, arguments: Arguments) -> Any:
                reply = await run_script(redis, operation, arguments)
                if operation == "claims":
                    assert reply == [held.ticket.encode()]
                    slots.release(held)
                    await slots.settle()
                return reply

            monkeypatch.setattr(worker_slots, "run_script", release_meanwhile)
            await slots.give_back_unknown("emoji", "denoising")
        await registry.withdraw("w")

    run_on_empty_store(each_store_url, scenario)
    assert not caplog.messages


def test_the_patience_of_a_claim_ends_only_without_workers(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        async with slots_of(redis, "a", ask_again_seconds=0.01) as slots:
            with pytest.raises(NoWorkers, match="no worker has served emoji/denoising for"):
                await slots.claim("emoji", "denoising", "r", patience_seconds=0.05)
            await slots.settle()
            registry = registry_of(redis)
            assert (await registry.load("emoji", "denoising")).queued == 0
            await registry.announce(worker("w"))
            held = await slots.claim("emoji", "denoising", "r", patience_seconds=0.0)
            waiting = asyncio.create_task(slots.claim("emoji", "denoising", "s", patience_seconds=0.0))
            await queued(registry, 1)
            slots.release(held)
            assert isinstance(await waiting, WorkerSlot)
            await registry.withdraw("w")

    run_on_empty_store(each_store_url, scenario)


def test_all_workers_of_a_model_serve_one_checkpoint(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = WorkerRegistry(redis)
        await registry.declare("emoji", "f")
        await registry.announce(worker("w"))
        with pytest.raises(FailedPrecondition, match="fingerprint f, this checkpoint has other") as caught:
            await registry.announce(worker("x", fingerprint="other"))
        assert caught.value.field == "model_fingerprint"
        assert [each.worker_id for each in await registry.live("emoji", "denoising")] == ["w"]
        assert 0 < await redis.pttl("fleet:model:emoji") <= 6_000
        with pytest.raises(InvalidInput, match="worker_id"):
            await registry.announce(worker("a|b"))
        await registry.withdraw("w")

    run_on_empty_store(each_store_url, scenario)
