"""The load of a service in the store, compared with the same sum in Python."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from redis.asyncio import Redis

from async_tests import wait_until
from common.scaling import StageLoad, StageWork
from common.state.connection import command
from common.state.records import State, state_event
from common.state.requests import AdmissionLimits, RequestStore
from common.state.stage_loads import StageLoads
from common.state.worker_slots import Computed, WorkerSlot, WorkerSlots
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import worker_pb2
from redis_servers import run_on_empty_store
from slot_claims import presence_of, registry_of

ASSUMED_SECONDS = 10.0
LIMITS = AdmissionLimits(services=("denoising",), max_open=1_000, queue_limit=1_000)


@dataclass
class Owner:
    """The store clients of one coordinator."""

    store: RequestStore
    slots: WorkerSlots
    claims: dict[str, asyncio.Task[WorkerSlot]] = field(default_factory=dict)

    async def submit(self, name: str, work: StageWork | None) -> None:
        """Admit a request, and claim a worker slot for it."""
        works = {} if work is None else {"denoising": work}
        record = pb.RequestRecord(request_id=name, model="emoji")
        await self.store.admit(record, limits=LIMITS, work=works)
        self.claims[name] = asyncio.create_task(self.slots.claim("emoji", "denoising", name))

    async def step(self, name: str, number: int, step: int, total: int) -> None:
        """Report progress."""
        progress = pb.StageProgress(service="denoising", step=step, total_steps=total)
        assert await self.store.append(name, [pb.Event(progress=progress)], number=number) is not None

    async def end(self, name: str, computed: Computed | None) -> None:
        """Release the worker slot after success, and end the request."""
        self.slots.release(await self.claims.pop(name), 1.0, computed)
        await self.slots.settle()
        assert await self.store.finish(name, State.REQUEST_STATE_SUCCEEDED, events=[]) is not None


class Fleet:
    """Three coordinators, workers of one service, and the load that the store reports."""

    def __init__(self, redis: Redis, owners: list[Owner]) -> None:
        self.redis = redis
        self.owners = owners
        self.registry = registry_of(redis)

    async def add_worker(self, number: int) -> None:
        """Announce a worker of capacity 1."""
        await self.registry.announce(
            worker_pb2.WorkerInfo(worker_id=f"w{number}", service="denoising", model="emoji", capacity=1)
        )

    async def load(self) -> StageLoad:
        """Read the load of the service."""
        return await StageLoads(self.redis, ASSUMED_SECONDS).read("emoji", "denoising")

    async def measure(self, name: str, work: StageWork, computed: Computed) -> None:
        """Run one request from admission to its end, on a free worker."""
        await self.owners[0].submit(name, work)
        await self.owners[0].end(name, computed)


@asynccontextmanager
async def running(redis: Redis) -> AsyncIterator[Fleet]:
    owners, presences = [], []
    for name in ("c1", "c2", "c3"):
        presence = presence_of(redis, name)
        await presence.start()
        presences.append(presence)
        owners.append(Owner(RequestStore(redis, owner=name), WorkerSlots(redis, presence)))
    fleet = Fleet(redis, owners)
    try:
        yield fleet
    finally:
        for owner in owners:
            for task in owner.claims.values():
                task.cancel()
            await asyncio.gather(*owner.claims.values(), return_exceptions=True)
            await owner.slots.close()
        for worker in list(fleet.registry._heartbeats):
            await fleet.registry.withdraw(worker)
        for presence in presences:
            await presence.stop()


def run(url: str, test: Callable[[Fleet], Awaitable[None]]) -> None:
    async def scenario(redis: Redis) -> None:
        async with running(redis) as fleet:
            await test(fleet)

    run_on_empty_store(url, scenario)


async def wait_for_slots(fleet: Fleet, number: int) -> None:
    async def are_held() -> bool:
        return (await fleet.load()).workers_held == number

    await wait_until(are_held)


@pytest.mark.parametrize("requests", [1, 40, 500])
def test_the_load_is_the_sum_of_remaining_steps_times_pace(store_url: str, requests: int) -> None:
    async def scenario(fleet: Fleet) -> None:
        rng = random.Random(requests)
        shapes = {f"s{number}": (rng.uniform(0.05, 2.0), 1 << (10 + number)) for number in range(5)}
        workers = min(requests, 12)
        for number in range(workers):
            await fleet.add_worker(number)
        for shape, (pace, tokens) in shapes.items():
            await fleet.measure(f"m-{shape}", StageWork(4, tokens, shape), Computed(4 * pace))
        works: dict[str, StageWork] = {}
        for number in range(requests):
            shape = rng.choice(list(shapes))
            works[f"r{number}"] = StageWork(rng.randint(1, 50), shapes[shape][1], shape)
            await fleet.owners[number % 3].submit(f"r{number}", works[f"r{number}"])
        await wait_for_slots(fleet, workers)
        await wait_until(has_waiting(fleet, requests - workers))
        done = dict.fromkeys(works, 0)
        runs = [name for owner in fleet.owners for name, task in owner.claims.items() if task.done()]
        for name in runs:
            done[name] = rng.randint(0, works[name].steps)
            owner = next(owner for owner in fleet.owners if name in owner.claims)
            await owner.step(name, 0, done[name], works[name].steps)

        def seconds(name: str) -> float:
            return (works[name].steps - done[name]) * shapes[works[name].shape][0]

        load = await fleet.load()
        running_seconds = sum(map(seconds, runs))
        waiting_seconds = sum(seconds(name) for name in works if name not in runs)
        assert load.running_seconds == pytest.approx(running_seconds, rel=0.05)
        assert load.waiting_seconds == pytest.approx(waiting_seconds, rel=0.05)
        assert (load.waiting_claims, load.open_requests) == (requests - len(runs), requests)
        assert not load.unmeasured

    run(store_url, scenario)


def test_the_load_is_zero_once_all_requests_have_ended(store_url: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        await fleet.add_worker(0)
        await fleet.measure("r", StageWork(4, 64, "s"), Computed(2.0))
        assert await fleet.load() == StageLoad(0, 0.0, 0, 0.0, 0)

    run(store_url, scenario)


def test_an_unknown_shape_has_the_pace_of_the_nearest_shape_scaled_by_tokens(store_url: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        await fleet.add_worker(0)
        await fleet.measure("small", StageWork(10, 100, "small"), Computed(1.0))
        await fleet.measure("large", StageWork(10, 10_000, "large"), Computed(200.0))
        await fleet.registry.withdraw("w0")
        await fleet.owners[0].submit("r", StageWork(10, 150, "other"))
        await fleet.owners[1].submit("l", StageWork(10, 5_000, "another"))
        await wait_until(has_waiting(fleet, 2))
        load = await fleet.load()
        assert load.waiting_seconds == pytest.approx(10 * 0.1 * 1.5 + 10 * 20.0 * 0.5)
        assert not load.unmeasured

    run(store_url, scenario)


def has_waiting(fleet: Fleet, claims: int) -> Callable[[], Awaitable[bool]]:
    async def waits() -> bool:
        return (await fleet.load()).waiting_claims == claims

    return waits


def test_without_measurements_the_assumed_time_counts_and_the_load_is_marked_as_unmeasured(store_url: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        await fleet.owners[0].submit("r", StageWork(10, 100, "s"))
        await fleet.owners[0].submit("older", None)
        await wait_until(has_waiting(fleet, 2))
        load = await fleet.load()
        assert (load.waiting_seconds, load.unmeasured) == (2 * ASSUMED_SECONDS, True)

    run(store_url, scenario)


def test_a_resumed_attempt_is_measured_by_its_own_steps(store_url: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        await fleet.add_worker(0)
        await fleet.measure("r", StageWork(10, 64, "s"), Computed(4.0, steps_before=8))
        await fleet.owners[0].submit("next", StageWork(10, 64, "s"))
        await wait_for_slots(fleet, 1)
        assert (await fleet.load()).running_seconds == pytest.approx(20.0)

    run(store_url, scenario)


def test_steps_of_a_handed_over_attempt_count_in_the_pace(store_url: str) -> None:
    """Three attempts of a request with 10 steps. The second attempt ends before its first step and is not measured."""

    async def scenario(fleet: Fleet) -> None:
        await fleet.add_worker(0)
        attempts = [Computed(6.0, 0, 3), Computed(0.2, 3, 0), Computed(28.0, 3)]
        owner = fleet.owners[0]
        await owner.submit("r", StageWork(10, 64, "s"))
        for attempt in attempts[:-1]:
            owner.slots.release(await owner.claims["r"], 0.0, attempt)
            await owner.slots.settle()
            owner.claims["r"] = asyncio.create_task(owner.slots.claim("emoji", "denoising", "r"))
        await owner.end("r", attempts[-1])
        await owner.submit("next", StageWork(10, 64, "s"))
        await wait_for_slots(fleet, 1)
        pace = (28.0 + 0.8 * 6.0) / (7 + 0.8 * 3)
        assert (await fleet.load()).running_seconds == pytest.approx(10 * pace)
        assert not (await fleet.load()).unmeasured

    run(store_url, scenario)


def test_the_newest_64_shapes_are_stored(store_url: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        await fleet.add_worker(0)
        for number in range(70):
            await fleet.measure(f"r{number}", StageWork(1, 64, f"s{number:02}"), Computed(1.0))
        stored = await command(fleet.redis, "HKEYS", "fleet:paces:emoji/denoising")
        assert len(stored) == 64
        assert b"s69" in stored

    run(store_url, scenario)


def test_claims_of_a_dead_coordinator_do_not_count_and_its_requests_count_as_open(store_url: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        await fleet.owners[0].submit("r", StageWork(10, 100, "s"))
        await wait_until(has_waiting(fleet, 1))
        await command(fleet.redis, "DEL", "fleet:coordinator:c1")
        load = await fleet.load()
        assert (load.waiting_claims, load.open_requests, load.is_active) == (0, 1, True)

    run(store_url, scenario)


def test_a_request_counts_only_at_the_services_of_its_variant(store_url: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        store, record = fleet.owners[0].store, pb.RequestRecord(request_id="r", model="emoji")
        limits = AdmissionLimits(services=("text_encoding", "denoising"))
        await store.admit(record, limits=limits, work={"denoising": StageWork(10, 64, "s")})
        loads = StageLoads(fleet.redis, ASSUMED_SECONDS)
        needed = {service: (await loads.read("emoji", service)).is_active for service in (*limits.services, "decoding")}
        assert needed == {"text_encoding": True, "denoising": True, "decoding": False}

    run(store_url, scenario)


def test_a_pace_is_a_moving_average(store_url: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        await fleet.add_worker(0)
        for number in range(40):
            await fleet.measure(f"r{number}", StageWork(1, 64, "s"), Computed(1.0 if number < 20 else 3.0))
        await fleet.owners[0].submit("next", StageWork(1, 64, "s"))
        await wait_for_slots(fleet, 1)
        pace = (await fleet.load()).running_seconds
        assert 2.9 < pace < 3.0
        assert math.isclose(pace, 3.0 - 2.0 * 0.8**20, rel_tol=1e-3)

    run(store_url, scenario)


def test_a_state_event_does_not_change_the_progress(store_url: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        await fleet.add_worker(0)
        await fleet.measure("r", StageWork(10, 64, "s"), Computed(10.0))
        owner = fleet.owners[0]
        await owner.submit("next", StageWork(10, 64, "s"))
        await wait_for_slots(fleet, 1)
        await owner.step("next", 0, 4, 10)
        assert await owner.store.append("next", [state_event(State.REQUEST_STATE_RUNNING)], number=1) is not None
        assert (await fleet.load()).running_seconds == pytest.approx(6.0)

    run(store_url, scenario)
