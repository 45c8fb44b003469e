"""A lost call counts as a loss of its request only if the request may have caused it. The request continues."""

from __future__ import annotations

import asyncio

from prometheus_client import REGISTRY
from redis.asyncio import Redis

from async_tests import wait_until
from common.rpc.stage_servicer import StageServicer
from common.state.connection import command, connect
from coordinator_fleet import FakeFleet, Gate, Script, Stub, run_on_fleet, submission, terminal
from fleet.v1 import generation_pb2 as pb

OTHER_SERVICES = ("text_encoding", "latent_preparation", "decoding")


async def deaths(redis: Redis, name: str) -> list[str]:
    """The states of a request's losses."""
    stored: bytes = await command(redis, "HGET", f"fleet:request:{name}", "deaths") or b""
    return [line.decode().split("|")[6] for line in stored.splitlines()]


async def check_success(stub: Stub, name: str) -> None:
    assert (await terminal(stub, name))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED


def lost_calls(begun: str) -> float:
    labels = {"service": "denoising", "model": "emoji", "begun": begun}
    return REGISTRY.get_sample_value("fleet_lost_calls_total", labels) or 0.0


async def wait_in_flight(servicer: StageServicer, number: int) -> None:
    await wait_until(lambda: servicer.in_flight == number)


def test_loss_is_not_counted_for_a_waiting_call(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        await fleet.add_workers(OTHER_SERVICES)
        worker = await fleet.add_worker("denoising", Script(fleet.scripts["denoising"].contract, gate), capacity=2)
        _, stub = await fleet.add_coordinator()
        before = lost_calls("yes"), lost_calls("no")
        running = (await stub.Submit(submission())).request.request_id
        await gate.wait_reached()
        waiting = (await stub.Submit(submission())).request.request_id
        await wait_in_flight(worker.servicer, 2)
        await worker.die()
        async with connect(fleet.url) as redis:

            async def both_are_lost() -> bool:
                return (lost_calls("yes") - before[0], lost_calls("no") - before[1]) == (1, 1)

            await wait_until(both_are_lost)

            async def is_recorded() -> bool:
                return await deaths(redis, running) == ["open"]

            await wait_until(is_recorded)
            assert await deaths(redis, waiting) == []
        await fleet.add_worker("denoising")
        await asyncio.gather(check_success(stub, running), check_success(stub, waiting))

    run_on_fleet(store_url, scenario)


def test_loss_without_begun_frames_is_counted_for_all_calls(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        await fleet.add_workers(OTHER_SERVICES)
        script = Script(fleet.scripts["denoising"].contract, gate)
        worker = await fleet.add_worker("denoising", script, capacity=2, reports_begun=False)
        _, stub = await fleet.add_coordinator()
        names = [(await stub.Submit(submission())).request.request_id for _ in range(2)]
        await wait_in_flight(worker.servicer, 2)
        await worker.die()
        async with connect(fleet.url) as redis:

            async def both_losses_are_counted() -> bool:
                return [await deaths(redis, name) for name in names] == [["open"], ["open"]]

            await wait_until(both_losses_are_counted)
        await fleet.add_workers(["denoising"])
        await asyncio.gather(*(check_success(stub, name) for name in names))

    run_on_fleet(store_url, scenario)


def test_loss_of_a_withdrawn_worker_is_not_counted(store_url: str) -> None:
    """A worker withdraws and disconnects if its grace period is too short for the call."""

    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        await fleet.add_workers(OTHER_SERVICES)
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
        await check_success(stub, name)

    run_on_fleet(store_url, scenario)


def test_next_heartbeat_of_the_worker_clears_the_loss(store_url: str) -> None:
    """Only the connection is lost. The request continues on another worker."""

    async def scenario(fleet: FakeFleet) -> None:
        first, second = Gate(), Gate()
        await fleet.add_workers(OTHER_SERVICES)
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
        await check_success(stub, name)

    run_on_fleet(store_url, scenario)


def test_request_runs_alone_on_its_worker_after_a_loss(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        first, second = Gate(), Gate()
        await fleet.add_workers(OTHER_SERVICES)
        dying = await fleet.add_worker("denoising", Script(fleet.scripts["denoising"].contract, first), capacity=2)
        _, stub = await fleet.add_coordinator()
        name = (await stub.Submit(submission())).request.request_id
        await first.wait_reached()
        await dying.die()
        worker = await fleet.add_worker("denoising", Script(fleet.scripts["denoising"].contract, second), capacity=2)
        await second.wait_reached()
        other = (await stub.Submit(submission())).request.request_id
        async with connect(fleet.url) as redis:

            async def is_queued() -> bool:
                return await redis.zcard("fleet:queue:emoji/denoising") == 1

            await wait_until(is_queued)
            slots: dict[bytes, bytes] = await command(redis, "HGETALL", "fleet:slots:emoji/denoising")
            worker_id = worker.info.worker_id.encode()
            (alone,) = [ticket for ticket, slot in slots.items() if slot.startswith(worker_id)]
            assert alone.startswith(name.encode())
        assert worker.servicer.in_flight == 1
        second.opened.set()
        await asyncio.gather(check_success(stub, name), check_success(stub, other))

    run_on_fleet(store_url, scenario)
