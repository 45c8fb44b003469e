"""Calls that are lost although their request is innocent: none of these losses counts, and the request goes on."""

from __future__ import annotations

import asyncio

from prometheus_client import REGISTRY
from redis.asyncio import Redis

from async_tests import wait_until
from common.rpc.stage_servicer import StageServicer
from common.state.connection import command, connect
from coordinator_fleet import FakeFleet, Gate, Script, Stub, run_on_fleet, submission, terminal
from fleet.v1 import generation_pb2 as pb

BESIDE = ("text_encoding", "latent_preparation", "decoding")


async def deaths(redis: Redis, name: str) -> list[str]:
    """The states of a request's losses."""
    stored: bytes = await command(redis, "HGET", f"fleet:request:{name}", "deaths") or b""
    return [line.decode().split("|")[6] for line in stored.splitlines()]


async def succeeds(stub: Stub, name: str) -> None:
    assert (await terminal(stub, name))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED


def lost_calls(begun: str) -> float:
    labels = {"service": "denoising", "model": "emoji", "begun": begun}
    return REGISTRY.get_sample_value("fleet_lost_calls_total", labels) or 0.0


async def has_in_flight(servicer: StageServicer, number: int) -> None:
    async def so_many() -> bool:
        return servicer.in_flight == number

    await wait_until(so_many)


def test_a_call_that_waits_behind_another_one_is_not_charged(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        await fleet.add_workers(BESIDE)
        worker = await fleet.add_worker("denoising", Script(fleet.scripts["denoising"].contract, gate), capacity=2)
        _, stub = await fleet.add_coordinator()
        before = lost_calls("yes"), lost_calls("no")
        runs = (await stub.Submit(submission())).request.request_id
        await gate.wait_reached()
        waits = (await stub.Submit(submission())).request.request_id
        await has_in_flight(worker.servicer, 2)
        await worker.die()
        async with connect(fleet.url) as redis:

            async def both_are_lost() -> bool:
                return (lost_calls("yes") - before[0], lost_calls("no") - before[1]) == (1, 1)

            await wait_until(both_are_lost)

            async def is_recorded() -> bool:
                return await deaths(redis, runs) == ["open"]

            await wait_until(is_recorded)
            assert await deaths(redis, waits) == []
        await fleet.add_worker("denoising")
        await asyncio.gather(succeeds(stub, runs), succeeds(stub, waits))

    run_on_fleet(store_url, scenario)


def test_a_worker_that_does_not_report_when_it_begins_charges_what_it_may_have_begun(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        await fleet.add_workers(BESIDE)
        script = Script(fleet.scripts["denoising"].contract, gate)
        worker = await fleet.add_worker("denoising", script, capacity=2, reports_begun=False)
        _, stub = await fleet.add_coordinator()
        names = [(await stub.Submit(submission())).request.request_id for _ in range(2)]
        await has_in_flight(worker.servicer, 2)
        await worker.die()
        async with connect(fleet.url) as redis:

            async def both_are_charged() -> bool:
                return [await deaths(redis, name) for name in names] == [["open"], ["open"]]

            await wait_until(both_are_charged)
        await fleet.add_workers(["denoising"])
        await asyncio.gather(*(succeeds(stub, name) for name in names))

    run_on_fleet(store_url, scenario)


def test_a_worker_that_leaves_charges_nobody(store_url: str) -> None:
    """As where its grace time is too short for the call."""

    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        await fleet.add_workers(BESIDE)
        worker = await fleet.add_worker("denoising", Script(fleet.scripts["denoising"].contract, gate))
        _, stub = await fleet.add_coordinator()
        before = lost_calls("yes")
        name = (await stub.Submit(submission())).request.request_id
        await gate.wait_reached()
        await worker.withdraw()
        await worker.hang_up()

        async def is_lost() -> bool:
            return lost_calls("yes") == before + 1

        await wait_until(is_lost)
        async with connect(fleet.url) as redis:

            async def waits_again() -> bool:
                return await redis.zcard("fleet:queue:emoji/denoising") == 1

            await wait_until(waits_again)
            assert await deaths(redis, name) == []
        await fleet.add_worker("denoising")
        await succeeds(stub, name)

    run_on_fleet(store_url, scenario)


def test_a_worker_that_is_announced_again_charges_nobody(store_url: str) -> None:
    """Only its connection was lost. The request goes on at once, without waiting for the next heartbeat."""

    async def scenario(fleet: FakeFleet) -> None:
        first, second = Gate(), Gate()
        await fleet.add_workers(BESIDE)
        worker = await fleet.add_worker("denoising", Script(fleet.scripts["denoising"].contract, first), ttl_seconds=5)
        _, stub = await fleet.add_coordinator()
        name = (await stub.Submit(submission())).request.request_id
        await first.wait_reached()
        await fleet.add_worker("denoising", Script(fleet.scripts["denoising"].contract, second))
        async with connect(fleet.url) as redis:
            await worker.hang_up()
            await second.wait_reached()

            async def is_cleared() -> bool:
                return await deaths(redis, name) == ["cleared"]

            await wait_until(is_cleared)
        second.opened.set()
        await succeeds(stub, name)

    run_on_fleet(store_url, scenario)


def test_after_a_loss_a_request_has_its_worker_alone(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        first, second = Gate(), Gate()
        await fleet.add_workers(BESIDE)
        dying = await fleet.add_worker("denoising", Script(fleet.scripts["denoising"].contract, first), capacity=2)
        _, stub = await fleet.add_coordinator()
        name = (await stub.Submit(submission())).request.request_id
        await first.wait_reached()
        await dying.die()
        worker = await fleet.add_worker("denoising", Script(fleet.scripts["denoising"].contract, second), capacity=2)
        await second.wait_reached()
        other = (await stub.Submit(submission())).request.request_id
        async with connect(fleet.url) as redis:

            async def waits() -> bool:
                return await redis.zcard("fleet:queue:emoji/denoising") == 1

            await wait_until(waits)
            slots: dict[bytes, bytes] = await command(redis, "HGETALL", "fleet:slots:emoji/denoising")
            mine = worker.info.worker_id.encode()
            (alone,) = [ticket for ticket, slot in slots.items() if slot.startswith(mine)]
            assert alone.startswith(name.encode())
        assert worker.servicer.in_flight == 1
        second.opened.set()
        await asyncio.gather(succeeds(stub, name), succeeds(stub, other))

    run_on_fleet(store_url, scenario)
