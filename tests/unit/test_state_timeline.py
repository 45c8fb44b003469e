"""Timelines of requests against real servers: entries, their bound, and expiry with the record."""

from __future__ import annotations

from typing import Any

import pytest
from redis.asyncio import Redis

from common.errors import NotFound
from common.state.leases import Leases
from common.state.records import State, duration, state_event
from common.state.requests import RequestStore, Retention
from common.state.worker_slots import Computed, WorkerSlots
from fleet.v1 import generation_pb2
from fleet.v1.generation_pb2 import TimelineEntry, TimelineKind
from redis_servers import run_on_empty_store
from slot_claims import registry_of, slots_of, worker

MAX_ENTRIES = 256
RETENTION_SECONDS = 60.0


class Case:
    """A request `r` of the coordinator `me`, and a worker `w1` of denoising."""

    def __init__(self, redis: Redis, slots: WorkerSlots) -> None:
        self.redis = redis
        self.slots = slots
        self.store = RequestStore(redis, owner="me", retention=Retention(RETENTION_SECONDS, RETENTION_SECONDS))
        self.leases = Leases(redis, "me")

    async def admit(self) -> None:
        await registry_of(self.redis).announce(worker("w1"))
        await self.store.admit(generation_pb2.RequestRecord(request_id="r", model="emoji"))

    async def save(self, number: int) -> None:
        assert await self.leases.save_step_checkpoint("r", 1, number, [b"origin"], step=number)

    async def run(self, computed: Computed | None = None, used: float = 0.0) -> None:
        """Run an attempt from its claim to its end."""
        self.slots.release(await self.slots.claim("emoji", "denoising", "r"), used, computed)
        await self.slots.settle()

    async def read(self) -> list[str]:
        """A line for each entry of the timeline, with its kind and its set fields."""
        return [text_of(entry) for entry in await self.store.timelines.read("r")]


def text_of(entry: TimelineEntry) -> str:
    kind = TimelineKind.Name(entry.kind).removeprefix("TIMELINE_KIND_").lower()
    state = State.Name(entry.state).removeprefix("REQUEST_STATE_") if entry.state else ""
    numbers = [str(number) for number in (entry.step, entry.total_steps, entry.epoch) if number]
    return " ".join(filter(None, (kind, entry.service, entry.worker_id, state, *numbers)))


def progress(step: int) -> generation_pb2.Event:
    return generation_pb2.Event(progress=generation_pb2.StageProgress(service="denoising", step=step, total_steps=9))


def test_a_timeline_has_lost_workers_hand_overs_and_take_overs(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        async with slots_of(redis, "me") as slots:
            case = Case(redis, slots)
            await case.admit()
            slot = await slots.claim("emoji", "denoising", "r")
            await case.store.append("r", [state_event(State.REQUEST_STATE_RUNNING), progress(0)], number=0)
            await case.store.append("r", [progress(1)], number=2)
            await case.save(4)
            await case.store.append("r", [progress(5)], number=3)
            await case.leases.add_death("r", 1, "w1", service="denoising", stage=2, ttl_seconds=1)
            slots.release(slot)
            await slots.settle()
            await case.run(Computed(1.0, 4, 6))
            await redis.hset("fleet:request:r", "owner", "dead")
            taken, _ = await case.leases.take_over("emoji")
            assert [each.epoch for each in taken] == [2]
            await case.run(used=1.0)
            await case.store.finish("r", State.REQUEST_STATE_SUCCEEDED, epoch=2)
            entries = await case.store.timelines.read("r")
            moments = [entry.time.ToMilliseconds() for entry in entries]
            assert moments == sorted(moments)
            assert moments[0] > 1_700_000_000_000
            attempt = ["queued denoising", "granted denoising w1"]
            first = [*attempt, "begun denoising 9", "step denoising 5 9", "checkpoint 4"]
            first += ["lost denoising w1", "ended denoising w1"]
            others = [*attempt, "handed_over denoising w1", "taken_over 2", *attempt, "completed denoising w1"]
            states = ["state QUEUED", "state RUNNING", "state SUCCEEDED"]
            # Entries of the same millisecond may be in another order.
            assert sorted(map(text_of, entries)) == sorted([*first, *others, *states])

    run_on_empty_store(each_store_url, scenario)


def test_a_claim_that_ends_without_a_worker_has_an_ended_entry(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        async with slots_of(redis, "me") as slots:
            case = Case(redis, slots)
            await case.admit()
            await registry_of(redis).withdraw("w1")
            with pytest.raises(Exception, match="no worker has served"):
                await slots.claim("emoji", "denoising", "r", patience_seconds=0.01)
            await slots.settle()
            assert await case.read() == ["state QUEUED", "queued denoising", "ended denoising"]

    run_on_empty_store(each_store_url, scenario)


def test_a_timeline_is_bounded_and_step_checkpoints_fill_at_most_half_of_it(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        async with slots_of(redis, "me") as slots:
            case = Case(redis, slots)
            await case.admit()
            slot = await slots.claim("emoji", "denoising", "r")
            for number in range(MAX_ENTRIES):
                await case.save(number)
            assert await redis.llen("fleet:timeline:r") == MAX_ENTRIES // 2 + 1
            lines = await case.read()
            assert {"queued denoising", "granted denoising w1", f"checkpoint {MAX_ENTRIES - 1}"} <= set(lines)
            slots.release(slot)
            for _ in range(MAX_ENTRIES // 2):
                await case.run()
            assert await redis.llen("fleet:timeline:r") == MAX_ENTRIES
            assert (await case.read())[-1] == "ended denoising w1"

    run_on_empty_store(each_store_url, scenario)


def test_a_timeline_expires_with_the_record(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        async with slots_of(redis, "me") as slots:
            case = Case(redis, slots)
            await case.admit()
            slot = await slots.claim("emoji", "denoising", "r")
            assert await redis.pttl("fleet:timeline:r") == -1
            await case.store.finish("r", State.REQUEST_STATE_SUCCEEDED)
            slots.release(slot, 1.0)  # the reply of the last worker may arrive after the end
            await slots.settle()
            assert "completed denoising w1" in await case.read()
            assert 0 < await redis.pttl("fleet:timeline:r") <= RETENTION_SECONDS * 1_000
            await redis.delete("fleet:timeline:r")
            await case.run()
            assert not await redis.exists("fleet:timeline:r")
            await redis.delete("fleet:request:r")
            with pytest.raises(NotFound, match="there is no request 'r'; it may have expired: records expire 1 min"):
                await case.store.get("r")

    run_on_empty_store(each_store_url, scenario)


def test_entries_of_one_millisecond_are_between_queued_and_the_terminal_state(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        async with slots_of(redis, "me") as slots:
            case = Case(redis, slots)
            await case.admit()
            await case.store.append("r", [state_event(State.REQUEST_STATE_RUNNING), progress(0), progress(9)], number=0)
            await case.store.finish("r", State.REQUEST_STATE_SUCCEEDED)
            rows: Any = await redis.xrange("fleet:events:r")
            await redis.delete("fleet:events:r", "fleet:timeline:r")
            for number, (_, fields) in enumerate(rows):
                await redis.xadd("fleet:events:r", fields, id=f"5-{number}")
            await redis.rpush("fleet:timeline:r", "5|queued|denoising||0", "5|granted|denoising|w1|0")
            attempt = ["queued denoising", "granted denoising w1"]
            events = ["state RUNNING", "begun denoising 9", "step denoising 9 9"]
            assert await case.read() == ["state QUEUED", *attempt, *events, "state SUCCEEDED"]

    run_on_empty_store(each_store_url, scenario)


def test_an_unknown_request_gets_no_timeline(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        async with slots_of(redis, "me") as slots:
            case = Case(redis, slots)
            await case.admit()
            slots.release(await slots.claim("emoji", "denoising", "unknown"))
            await slots.settle()
            assert not await redis.exists("fleet:timeline:unknown")

    run_on_empty_store(each_store_url, scenario)


def test_an_entry_of_a_later_version_is_omitted(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        async with slots_of(redis, "me") as slots:
            case = Case(redis, slots)
            await case.admit()
            await redis.rpush("fleet:timeline:r", "1|dreamt|denoising|w1|0", "1|queued", "x")
            assert await case.read() == ["state QUEUED"]

    run_on_empty_store(each_store_url, scenario)


@pytest.mark.parametrize(
    ("seconds", "text"), [(86_400, "24 h"), (5_400, "90 min"), (90, "90 s"), (0.5, "0.5 s"), (60, "1 min")]
)
def test_durations_are_in_the_largest_whole_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text
