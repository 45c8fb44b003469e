"""Claims get only workers whose contracts fit, also in a fleet with processes of the last release."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redis import Redis as SyncRedis
from redis.asyncio import Redis

from async_tests import wait_until
from common.errors import ResourceExhausted
from common.stage import Contract
from common.state.connection import Arguments, command, script_call, script_source
from common.state.requests import AdmissionLimits, RequestStore
from common.state.worker_slots import NoWorkers, WorkerSlots
from common.wiring import Wiring, contract_text, fault_of, older_text
from contracts import FAULT, NEEDING, READ, SUPPLIED, WIRING, contract, worker_with
from fleet.v1 import generation_pb2, worker_pb2
from redis_servers import run_on_empty_store
from slot_claims import SLOW, queued, registry_of, slots_of

PLACE = "emoji/denoising"
NAMES, KINDS = ("canvas", "schedule", "latents"), ("Canvas", "Latents", "Stream[Latents]")


async def hash_of(redis: Any, name: str) -> dict[str, str]:
    """The hash `name` of the service PLACE."""
    return {key.decode(): value.decode() for key, value in (await redis.hgetall(f"fleet:{name}:{PLACE}")).items()}


async def take(slots: WorkerSlots, name: str, **options: Any) -> str:
    """Claim a worker slot with WIRING. Returns the ID of the worker."""
    slot = await slots.claim("emoji", "denoising", name, wiring=WIRING, **options)
    return slot.worker.worker_id


@pytest.mark.parametrize("options", [{}, {"alone": True}, {"first": True}, {"equal_to": "n"}])
def test_a_claim_passes_over_workers_that_do_not_fit(each_store_url: str, options: Mapping[str, Any]) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        for number in range(20):  # more than one page of the worker index
            await registry.announce(worker_with(NEEDING, f"a{number}", capacity=9, numerics="n"))
        await registry.announce(worker_with(contract(), "b", capacity=2))
        async with slots_of(redis, "me") as slots:
            held = await slots.claim("emoji", "denoising", "r0", wiring=WIRING, **options)
            assert held.worker.worker_id == "b"
            slots.release(held)
            await slots.settle()
            assert [await take(slots, f"r{number}") for number in (1, 2)] == ["b", "b"]
            waiting = asyncio.create_task(take(slots, "r3", **options))
            await queued(registry, 1)
            await registry.announce(worker_with({"": contract()}, "c"))
            assert await waiting == "c"
            # The store chose the worker: the coordinator has not refused and avoided another worker.
            assert not await redis.exists("fleet:avoided:me")

    run_on_empty_store(each_store_url, scenario)


def test_a_released_worker_slot_goes_to_a_claim_that_fits(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        await registry.announce(worker_with(NEEDING, "new", capacity=2))
        await registry.announce(worker_with(contract(), "old"))
        newer = Wiring("", NEEDING.inputs, READ)
        async with slots_of(redis, "mine") as mine, slots_of(redis, "newer") as others:
            held = await mine.claim("emoji", "denoising", "r1", wiring=WIRING)
            assert held.worker.worker_id == "old"
            both = [await others.claim("emoji", "denoising", f"n{number}", wiring=newer) for number in range(2)]
            assert {slot.worker.worker_id for slot in both} == {"new"}
            waiting = asyncio.create_task(take(mine, "r2"))
            await queued(registry, 1)
            after = asyncio.create_task(others.claim("emoji", "denoising", "n3", wiring=newer))
            await queued(registry, 2)
            others.release(both[0])  # The first claim of the queue does not fit; the second claim fits.
            assert (await after).worker.worker_id == "new"
            assert not waiting.done()
            mine.release(held)
            assert await waiting == "old"

    run_on_empty_store(each_store_url, scenario)


def test_a_claim_without_a_fitting_worker_is_refused(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        await registry.announce(worker_with(NEEDING, "new"))
        seen: list[str] = []
        async with slots_of(redis, "me") as slots:
            with pytest.raises(NoWorkers, match=f"able to run the request for 0.2 s: worker new, {FAULT}; run"):
                await take(slots, "r1", patience_seconds=0.2, on_no_workers=seen.append)
            assert set(seen) == {f"worker new, {FAULT}"}
            await registry.withdraw("new")
            with pytest.raises(NoWorkers, match="no worker has served"):
                await take(slots, "r2", patience_seconds=0.0, on_no_workers=seen.append)
            assert seen[-1] == ""

    run_on_empty_store(each_store_url, scenario)


def test_a_claim_of_the_last_release_fits_every_worker(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        await registry_of(redis).announce(worker_with(NEEDING, "new"))
        async with slots_of(redis, "me") as slots:
            assert (await slots.claim("emoji", "denoising", "r")).worker.worker_id == "new"

    run_on_empty_store(each_store_url, scenario)


def test_workers_that_fit_no_variant_are_not_counted(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        image = Wiring("image", NEEDING.inputs, READ)
        half = {"text": contract(), "image": contract(inputs={"other": "Latents"})}
        for info in (
            worker_with(contract(), "both", capacity=2, numerics="n"),
            worker_with(half, "half", capacity=3, numerics="n"),
            worker_with(contract(outputs={}), "none", capacity=4, numerics="n"),
        ):
            await registry.announce(info)
        wirings = [Wiring("text", SUPPLIED, READ), image]
        async with slots_of(redis, "me") as slots:
            await slots.claim("emoji", "denoising", "r")
            held = await slots.claim("emoji", "denoising", "s", wiring=image)
            assert held.worker.worker_id == "both"
            load = await registry.load("emoji", "denoising", wirings)
            assert {info.worker_id for info in load.workers} == {"both", "half"}
            assert (load.capacity, load.num_unusable) == (5, 1)
            granted = [each.partition("|")[0] for each in (await hash_of(redis, "slots")).values()]
            assert load.busy == len([each for each in granted if each != "none"])
            faults = {(each.worker_id, each.variant): each.reason for each in load.incompatible}
            written = "output 'latents': the coordinator reads Latents, the worker writes none"
            assert faults == {
                ("half", "image"): "input 'other': the worker requires Latents, the coordinator supplies none",
                ("none", "text"): written,
                ("none", "image"): written,
            }
        assert len((await registry.load("emoji", "denoising")).workers) == 3
        assert await registry.free_slots(worker_with(contract(), "leaving", numerics="n")) == 2

    run_on_empty_store(each_store_url, scenario)


def test_admission_counts_only_workers_that_fit(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry, store = registry_of(redis), RequestStore(redis, owner="me")
        await registry.announce(worker_with(NEEDING, "new", capacity=9))
        await registry.announce(worker_with(contract(), "old", capacity=2))
        limits = AdmissionLimits(("denoising",), queue_seconds=1.0)

        async def admit(number: int) -> None:
            record = generation_pb2.RequestRecord(request_id=f"r{number}", model="emoji")
            await store.admit(record, limits=limits, wirings={"denoising": WIRING})

        for number in range(2):
            await admit(number)
        with pytest.raises(ResourceExhausted):
            await admit(2)

    run_on_empty_store(each_store_url, scenario)


async def run_older_worker(redis: Redis, info: worker_pb2.WorkerInfo) -> None:
    """Announce a worker as release 0.1 does, with one contract for all workers in the model's record."""
    place = f"{info.model}/{info.service}"
    await redis.hset(f"fleet:model:{info.model}", f"contract:{info.service}", older_text(info))
    fields: list[str | bytes] = ["model", info.model, "service", info.service, "capacity", str(info.capacity)]
    fields += ["lasts", "6000", "granted", "0", "info", info.SerializeToString()]
    await command(redis, "HSET", f"fleet:worker:{info.worker_id}", *fields)
    await redis.zadd(f"fleet:workers:{place}", {info.worker_id: 99_999_999_999_999})


def test_a_worker_of_the_last_release_has_the_contract_of_its_release(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        await run_older_worker(redis, worker_with(contract(outputs={}), "older"))
        async with slots_of(redis, "me") as slots:
            with pytest.raises(NoWorkers, match="worker older, output 'latents'"):
                await take(slots, "r1", patience_seconds=0.0)
            await registry.announce(worker_with(contract(), "newer"))
            # The contract is moved, so that a process of the last release with another contract is not refused.
            assert await redis.hkeys("fleet:model:emoji") == [b"fingerprint"]
            assert 0 < await redis.pttl(f"fleet:older:{PLACE}") <= 3 * SLOW * 1_000
            assert await take(slots, "r2") == "newer"
            (fault,) = (await registry.load("emoji", "denoising", [WIRING])).incompatible
            assert fault.worker_id == "older"

    run_on_empty_store(each_store_url, scenario)


def test_coordinators_of_the_last_release_get_only_workers_that_accept_their_inputs(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        await redis.hset("fleet:model:emoji", "contract:denoising", older_text(worker_with(contract())))
        newer = worker_with({"": NEEDING}, "newer", capacity=2)
        await registry.announce(newer)
        await registry.announce(worker_with({"": contract()}, "same"))

        async def listed_capacities() -> dict[str, str]:
            """The capacity of each live worker, as the last release reads it."""
            return {worker: copy.partition("|")[0] for worker, copy in (await hash_of(redis, "live")).items()}

        assert await listed_capacities() == {"newer": "0", "same": "1"}
        wiring = Wiring("", NEEDING.inputs, READ)
        async with slots_of(redis, "me") as slots:
            assert await take(slots, "r0") == "same"
            older = asyncio.create_task(slots.claim("emoji", "denoising", "older"))
            await queued(registry, 1)
            held = [await slots.claim("emoji", "denoising", f"r{number}", wiring=wiring) for number in range(2)]
            assert {slot.worker.worker_id for slot in held} == {"newer"}
            full = 2**52  # the last release grants no slot of a worker with this score or a higher score
            assert await redis.zcount(f"fleet:load:{PLACE}", "-inf", f"({full}") == 0
            waiting = asyncio.create_task(slots.claim("emoji", "denoising", "r3", wiring=wiring))
            await queued(registry, 2)
            slots.release(held[0])
            assert (await waiting).worker.worker_id == "newer"
            await redis.delete(f"fleet:older:{PLACE}")
            await registry.announce(newer)
            assert (await listed_capacities())["newer"] == "2"
            assert not older.done()
            slots.release(held[1])
            assert (await older).worker.worker_id == "newer"

    run_on_empty_store(each_store_url, scenario)


def test_a_grant_of_an_incompatible_worker_by_the_last_release_is_released(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        newer = worker_with(NEEDING, "newer")
        await registry.announce(newer)
        async with slots_of(redis, "me") as slots:
            waiting = asyncio.create_task(take(slots, "r"))
            await queued(registry, 1)
            ((ticket, entry),) = (await hash_of(redis, "waiting")).items()
            # Write the grant of a released worker slot as the script of the last release does.
            await redis.hset(f"fleet:slots:{PLACE}", ticket, "newer|me|1|1")
            await redis.hdel(f"fleet:waiting:{PLACE}", ticket)
            await redis.zrem(f"fleet:queue:{PLACE}", entry)
            grant = b"grant\n" + ticket.encode() + b"\n" + newer.SerializeToString()
            await redis.publish("fleet:coordinator:me", grant)

            async def claims_again() -> bool:
                tickets = list(await hash_of(redis, "waiting"))
                return bool(tickets) and ticket not in tickets and "/first/" in tickets[0]

            await wait_until(claims_again)
            await slots.settle()
            assert not await redis.hexists(f"fleet:slots:{PLACE}", ticket)
            await registry.announce(worker_with(contract(), "older"))
            assert await waiting == "older"

    run_on_empty_store(each_store_url, scenario)


def test_lost_wirings_and_contracts_are_replaced(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        registry = registry_of(redis)
        await registry.announce(worker_with(NEEDING, "new"))
        await registry.announce(worker_with(contract(), "old"))
        async with slots_of(redis, "me") as slots:
            assert await take(slots, "r1") == "old"
            await redis.delete(f"fleet:wirings:{PLACE}", f"fleet:contracts:{PLACE}", f"fleet:indexed:{PLACE}")
            await redis.hset(f"fleet:contracts:{PLACE}", "gone", "digest")
            waiting = asyncio.create_task(take(slots, "r2"))
            await queued(registry, 1)
            assert (await hash_of(redis, "contracts")).keys() == {"new", "old"}
            await registry.announce(worker_with(contract(), "third"))
            assert await waiting == "third"

    run_on_empty_store(each_store_url, scenario)


def test_a_claim_is_one_round_trip(each_store_url: str) -> None:
    async def scenario(redis: Redis) -> None:
        await registry_of(redis).announce(worker_with(contract(), "w"))
        async with slots_of(redis, "me") as slots:
            before = (await redis.info("commandstats"))["cmdstat_evalsha"]["calls"]
            await take(slots, "r")
            assert (await redis.info("commandstats"))["cmdstat_evalsha"]["calls"] - before == 1

    run_on_empty_store(each_store_url, scenario)


slot_maps = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(KINDS))
contracts = st.builds(
    lambda inputs, outputs, optional: Contract("denoising", inputs, outputs, optional & inputs.keys()),
    slot_maps,
    slot_maps,
    st.frozensets(st.sampled_from(NAMES)),
)
wirings = st.builds(Wiring, st.sampled_from(("", "text", "image")), slot_maps, slot_maps)


@st.composite
def workers(draw: st.DrawFn) -> worker_pb2.WorkerInfo:
    """A worker of any release, whose variants may disagree on a slot."""
    info = worker_with(draw(contracts))
    names = draw(st.sampled_from(((), ("",), ("text", "image"))))
    for name in names:
        part = worker_with(draw(contracts)).contract
        info.variant_contracts.add(variant=name, contract=part)
    return info


@settings(max_examples=150)
@given(workers(), st.lists(wirings, min_size=1, max_size=3))
def test_the_store_and_the_coordinator_find_the_same_fault(
    each_store_url: str, info: worker_pb2.WorkerInfo, wanted: list[Wiring]
) -> None:
    redis: Any = SyncRedis.from_url(each_store_url, protocol=2)
    redis.script_load(script_source())
    announced: Arguments = {
        "worker": "w",
        "model": "any",
        "service": "denoising",
        "capacity": 1,
        "info": info.SerializeToString(),
        "lasts": 60_000,
        "numerics": "",
        "contract": contract_text(info),
        "older": older_text(info),
    }
    redis.execute_command(*script_call("announce", announced))
    status = script_call("status", {"place": "any/denoising", "wirings": [each.text for each in wanted]})
    infos, *_, rows = redis.execute_command(*status)
    redis.close()
    found = {number: reason.decode() for _, number, reason in rows}
    expected = {number: fault_of(info, each) for number, each in enumerate(wanted, start=1)}
    assert found == {number: fault for number, fault in expected.items() if fault}
    assert bool(infos) == (not all(expected.values()))
