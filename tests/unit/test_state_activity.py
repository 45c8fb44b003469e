"""Activities of requests as the store reports them, and the cost of reading them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import pytest
from redis.asyncio import Redis

from async_tests import wait_until
from common.scaling import StageLoad, StageWork
from common.state.activity import Activities, StageQueue, read_activities
from common.state.connection import command
from common.state.leases import Leases
from common.state.presence import Presence
from common.state.records import State
from common.state.requests import AdmissionLimits, RequestStore
from common.state.stage_loads import StageLoads
from common.state.worker_slots import Computed, QueuePriority, WorkerSlot, WorkerSlots
from common.state.workers import WorkerRegistry
from common.wiring import Wiring
from contracts import NEEDING, WIRING, contract, worker_with
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import worker_pb2
from redis_servers import run_on_empty_store, running_server
from services.coordinator.activity import RequestActivities

SERVICES = ("text_encoding", "denoising")
LIMITS = AdmissionLimits(services=SERVICES, max_open=100_000, queue_limit=100_000, max_open_of_caller=100_000)
KIND = pb.ActivityKind


@pytest.fixture(scope="module")
def unsynced_store_url() -> Iterator[str]:
    """URL of a Valkey server without fsync, because these tests store hundreds of requests."""
    with running_server("valkey", "--appendfsync", "no") as server:
        yield server.url


@dataclass
class Fleet:
    """The store clients of one coordinator. No timer sends commands, so that a test can count commands."""

    redis: Redis
    store: RequestStore
    slots: WorkerSlots
    registry: WorkerRegistry
    claims: dict[str, asyncio.Task[WorkerSlot]] = field(default_factory=dict)

    async def add_worker(self, name: str = "w0", service: str = "denoising", capacity: int = 1) -> None:
        info = worker_pb2.WorkerInfo(worker_id=name, service=service, model="emoji", capacity=capacity)
        await self.registry.announce(info)

    async def add_incompatible_worker(self, name: str) -> None:
        """Announce a worker that fits no claim with WIRING."""
        await self.registry.announce(worker_with(NEEDING, name))

    async def submit(self, name: str, caller: str = "", priority: int = 0, *, claims: bool = True) -> None:
        """Admit a request and, with `claims`, claim a worker slot of the denoising service for it."""
        work = {"denoising": StageWork(20, 64, "64x64")}
        record = pb.RequestRecord(request_id=name, model="emoji", caller=caller)
        record.parameters.prompt = f"the prompt of {name}"
        await self.store.admit(record, limits=LIMITS, work=work)
        if claims:
            await self.claim(name, caller, priority)

    async def claim(self, name: str, caller: str = "", priority: int = 0, wiring: Wiring | None = None) -> None:
        """Claim a worker slot, and wait until the store has the claim."""
        claim = self.slots.claim("emoji", "denoising", name, QueuePriority(priority, caller=caller), wiring=wiring)
        self.claims[name] = asyncio.create_task(claim)
        await wait_until(lambda: self._has_claim(name))

    async def _has_claim(self, name: str) -> bool:
        return await command(self.redis, "HGET", f"fleet:request:{name}", "ticket:denoising") is not None

    async def read(self, caller: str = "", most: int = 50) -> Activities:
        return await read_activities(self.redis, {"emoji": SERVICES}, caller=caller, most=most)

    async def activities(self, caller: str = "", most: int = 50) -> dict[str, list[pb.RequestActivity]]:
        return {
            each.record.request_id: list(each.record.activities) for each in (await self.read(caller, most)).requests
        }

    async def kinds(self) -> dict[str, list[str]]:
        found = await self.activities()
        return {name: [KIND.Name(each.kind).removeprefix("ACTIVITY_KIND_") for each in found[name]] for name in found}


def run(url: str, test: Callable[[Fleet], Awaitable[None]]) -> None:
    async def scenario(redis: Redis) -> None:
        presence = Presence(redis, "c1", heartbeat_seconds=60, ttl_seconds=600)
        await presence.start()
        registry = WorkerRegistry(redis, heartbeat_seconds=60, ttl_seconds=600)
        slots = WorkerSlots(redis, presence, ask_again_seconds=600)
        fleet = Fleet(redis, RequestStore(redis, owner="c1"), slots, registry)
        try:
            await test(fleet)
        finally:
            for task in fleet.claims.values():
                task.cancel()
            await asyncio.gather(*fleet.claims.values(), return_exceptions=True)
            for worker in list(registry._heartbeats):
                await registry.withdraw(worker)
            await slots.close()
            await presence.stop()

    run_on_empty_store(url, scenario)


def test_incompatible_workers_do_not_count_as_live_workers(unsynced_store_url: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        await fleet.add_incompatible_worker("odd")
        for name in ("first", "second"):
            await fleet.submit(name, claims=False)
            await fleet.claim(name, wiring=WIRING)
        assert await fleet.kinds() == {"first": ["NO_WORKER"], "second": ["NO_WORKER"]}
        await fleet.registry.announce(worker_with(contract(), "fitting"))
        assert await fleet.kinds() == {"first": ["RUNNING"], "second": ["QUEUED"]}
        found = {each.record.request_id: each.queues for each in (await fleet.read()).requests}
        assert found["second"] == [StageQueue("emoji", "denoising", live_workers=1)]

    run(unsynced_store_url, scenario)


def test_each_wait_has_its_kind_of_activity(unsynced_store_url: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        await fleet.submit("new", claims=False)
        assert await fleet.kinds() == {"new": ["COORDINATOR"]}
        await fleet.claim("new")
        assert await fleet.kinds() == {"new": ["NO_WORKER"]}
        await fleet.add_worker()
        await fleet.submit("second")
        assert await fleet.kinds() == {"new": ["RUNNING"], "second": ["QUEUED"]}
        found = await fleet.activities()
        (running,), (queued,) = found["new"], found["second"]
        assert (running.service, running.worker_id, running.total_steps) == ("denoising", "w0", 20)
        assert running.HasField("since")
        assert not running.HasField("requests_ahead")
        assert (queued.service, queued.worker_id, queued.requests_ahead) == ("denoising", "", 0)
        assert not queued.HasField("since")

    run(unsynced_store_url, scenario)


def test_the_steps_of_an_activity_equal_those_of_the_latest_progress(unsynced_store_url: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        await fleet.add_worker()
        await fleet.submit("r1")
        progress = pb.StageProgress(service="denoising", step=7, total_steps=20)
        assert await fleet.store.append("r1", [pb.Event(progress=progress)], number=1) is not None
        ((running,),) = (await fleet.activities()).values()
        assert (running.step, running.total_steps) == (7, 20)

    run(unsynced_store_url, scenario)


def test_a_request_waits_for_a_retry_after_its_attempt_ended(unsynced_store_url: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        await fleet.add_worker()
        await fleet.submit("r1")
        slot = await fleet.claims.pop("r1")
        await command(fleet.redis, "DEL", "fleet:worker:w0")
        ((lost,),) = (await fleet.activities()).values()
        assert (lost.kind, lost.worker_id) == (KIND.ACTIVITY_KIND_RETRY, "w0")
        fleet.slots.release(slot)
        await fleet.slots.settle()
        assert await fleet.kinds() == {"r1": ["RETRY"]}
        await fleet.add_worker("w1")
        await command(fleet.redis, "HSET", "fleet:avoided:c1", "w1", f"{2**42}|200")  # a pause that outlasts the test
        await fleet.claim("r1")
        await wait_until(lambda: _has_kinds(fleet, "QUEUED", "RUNNING", "RETRY"))
        assert await fleet.kinds() == {"r1": ["RETRY"]}  # the only free worker is avoided

    run(unsynced_store_url, scenario)


async def _has_kinds(fleet: Fleet, *kinds: str) -> bool:
    num_waiting = await command(fleet.redis, "HLEN", "fleet:waiting:emoji/denoising")
    return bool(num_waiting) and all(each in kinds for (each,) in (await fleet.kinds()).values())


def test_a_completed_stage_has_no_activity(unsynced_store_url: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        await fleet.add_worker()
        await fleet.submit("r1")
        fleet.slots.release(await fleet.claims.pop("r1"), 1.0, Computed(1.0))
        await fleet.slots.settle()
        assert await fleet.kinds() == {"r1": ["COORDINATOR"]}
        await fleet.store.finish("r1", State.REQUEST_STATE_SUCCEEDED)
        assert await fleet.kinds() == {"r1": []}
        fields = await command(fleet.redis, "HKEYS", "fleet:request:r1")
        assert not [each for each in fields if each.startswith(b"ticket:")]

    run(unsynced_store_url, scenario)


def test_a_request_of_a_dead_coordinator_waits_for_a_take_over(unsynced_store_url: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        await fleet.add_worker()
        await fleet.submit("r1")
        await command(fleet.redis, "SET", "fleet:coordinator:c2", "1")
        await command(fleet.redis, "DEL", "fleet:coordinator:c1")
        assert await fleet.kinds() == {"r1": ["TAKE_OVER"]}
        taken, _ = await Leases(fleet.redis, "c2").take_over("emoji")
        assert [each.record.request_id for each in taken] == ["r1"]
        assert await fleet.kinds() == {"r1": ["COORDINATOR"]}

    run(unsynced_store_url, scenario)


def test_a_claim_of_an_earlier_version_has_an_unspecified_kind(unsynced_store_url: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        await fleet.add_worker()
        await fleet.submit("r1")
        await command(fleet.redis, "HDEL", "fleet:request:r1", "ticket:denoising")
        assert await fleet.kinds() == {"r1": ["UNSPECIFIED"]}

    run(unsynced_store_url, scenario)


def test_requests_ahead_are_counted_in_the_order_of_the_queue(unsynced_store_url: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        await fleet.add_worker()
        await fleet.submit("running", "ann")
        for name, caller, priority in (
            ("a1", "ann", 0),
            ("a2", "ann", 0),
            ("a3", "ann", 0),
            ("b1", "bob", 0),
            ("urgent", "bob", 5),
            ("late", "ann", -5),
        ):
            await fleet.submit(name, caller, priority)
        ahead = {name: each[0].requests_ahead for name, each in (await fleet.activities()).items()}
        assert ahead == {"running": 0, "urgent": 0, "a1": 1, "b1": 2, "a2": 3, "a3": 4, "late": 5}
        assert list(await fleet.activities()) == ["running", "urgent", "a1", "b1", "a2", "a3", "late"]

    run(unsynced_store_url, scenario)


def test_the_wait_is_estimated_from_work_and_workers(unsynced_store_url: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        await fleet.add_worker(capacity=1)
        loads = StageLoads(fleet.redis, 10.0)
        activities = RequestActivities(fleet.redis, loads)
        for number in range(4):
            await fleet.submit(f"r{number}")
        listed = await activities.list({"emoji": SERVICES}, caller="", most=10)
        assert not any(each.activities[0].HasField("estimated_seconds") for each in listed.requests)
        await command(fleet.redis, "HSET", "fleet:paces:emoji/denoising", "64x64", "5.0 10.0 64 1700000000000")
        await loads.read("emoji", "denoising")
        listed = await activities.list({"emoji": SERVICES}, caller="", most=10)
        # Each request has 20 steps of 0.5 s; one request runs.
        assert [each.activities[0].estimated_seconds for each in listed.requests] == [0.0, 10.0, 20.0, 30.0]
        assert listed.HasField("time")
        (pace,) = await loads.paces("emoji", "denoising")
        assert (pace.shape, pace.seconds_per_step) == ("64x64", 0.5)

    run(unsynced_store_url, scenario)


def test_a_damaged_pace_is_omitted(unsynced_store_url: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        for value in ("", "a b c d", "1.0 0.0 64 1700000000000", "1.0 2.0"):
            await command(fleet.redis, "HSET", "fleet:paces:emoji/denoising", f"shape {value}", value)
        assert await StageLoads(fleet.redis, 10.0).paces("emoji", "denoising") == []

    run(unsynced_store_url, scenario)


def test_a_caller_gets_only_its_own_requests(unsynced_store_url: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        await fleet.add_worker()
        for name, caller in (("a1", "ann"), ("b1", "bob"), ("a2", "ann"), ("a0", "ann"), ("b0", "bob")):
            await fleet.submit(name, caller)
        for name in ("a0", "b0"):
            assert await fleet.store.finish(name, State.REQUEST_STATE_FAILED) is not None
        assert list(await fleet.activities("ann")) == ["a1", "a2", "a0"]
        assert list(await fleet.activities("bob")) == ["b1", "b0"]
        assert list(await fleet.activities("eve")) == []
        (queued,) = (await fleet.activities("bob"))["b1"]
        assert (queued.kind, queued.requests_ahead) == (KIND.ACTIVITY_KIND_QUEUED, 1)

    run(unsynced_store_url, scenario)


def test_a_bounded_list_has_running_and_waiting_requests(unsynced_store_url: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        await fleet.add_worker(capacity=10)
        for number in range(30):
            await fleet.submit(f"r{number:02}")
        await fleet.submit("done", claims=False)
        await fleet.store.finish("done", State.REQUEST_STATE_SUCCEEDED)
        found = await fleet.activities(most=8)
        assert list(found) == ["r00", "r01", "r02", "r03", "r10", "r11", "r12", "r13"]
        assert list(await fleet.activities(most=40))[-1] == "done"

    run(unsynced_store_url, scenario)


def test_the_number_of_commands_of_a_read_does_not_grow_with_the_queue(unsynced_store_url: str) -> None:
    async def scenario(fleet: Fleet) -> None:
        await fleet.add_worker()
        costs: list[int] = []
        for number in range(900):
            caller = f"caller{number % 20}"
            if number in (300, 899):
                await asyncio.sleep(0.3)  # Claims in flight reach the store, so the cost does not include them.
                before = await _commands(fleet.redis)
                await fleet.read(most=20)
                costs.append(await _commands(fleet.redis) - before)
            await fleet.store.admit(
                pb.RequestRecord(request_id=f"r{number}", model="emoji", caller=caller), limits=LIMITS
            )
            claim = fleet.slots.claim("emoji", "denoising", f"r{number}", QueuePriority(caller=caller))
            fleet.claims[f"r{number}"] = asyncio.create_task(claim)
            await asyncio.sleep(0)
        assert costs[1] < 1.3 * costs[0], costs
        assert costs[1] < 5_000

    run(unsynced_store_url, scenario)


async def _commands(redis: Redis) -> int:
    """Number of commands that the server has run, including those of scripts."""
    info = await redis.info("commandstats")
    return sum(stats["calls"] for stats in info.values())


def test_a_load_is_reread_after_fifty_times_the_duration_of_its_read(
    unsynced_store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(fleet: Fleet) -> None:
        loads, durations = StageLoads(fleet.redis, 10.0), []
        read = loads._read

        async def read_slowly(model: str, service: str) -> StageLoad:
            began = time.monotonic()
            await asyncio.sleep(0.004)
            load = await read(model, service)
            durations.append(time.monotonic() - began)
            return load

        monkeypatch.setattr(loads, "_read", read_slowly)
        first = await loads.recent("emoji", "denoising")
        since = time.monotonic()
        assert await loads.recent("emoji", "denoising") is first

        async def is_read_again() -> bool:
            return await loads.recent("emoji", "denoising") is not first

        await wait_until(is_read_again)
        assert len(durations) == 2
        assert time.monotonic() - since > 40 * durations[0]

    run(unsynced_store_url, scenario)
