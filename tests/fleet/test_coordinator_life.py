"""How a coordinator starts, waits for its store, shuts down, and what becomes of the requests of one that died."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import AsyncIterable, Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.errors import FailedPrecondition, InvalidInput
from common.rpc.client import open_channel
from common.state.connection import connect
from common.state.workers import WorkerRegistry
from coordinator_fleet import FakeFleet, Gate, Stub, emoji, error_of, run_on_fleet, submission, terminal
from fleet.v1 import generation_pb2 as pb
from redis_servers import RedisServer, running_server, server_binaries, until
from services.coordinator.__main__ import main
from services.coordinator.coordinator import start_coordinator
from services.coordinator.settings import CoordinatorSettings

MODEL = emoji()


@pytest.fixture(params=sorted(server_binaries()))
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with running_server(request.param) as server:
        yield server


async def ready(address: str) -> bool:
    async with open_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest(service="fleet.v1.GenerationService"))
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def state_of(stub: Stub, name: str) -> pb.RequestState.ValueType:
    return (await stub.GetRequest(pb.GetRequestRequest(request_id=name))).request.state


def test_a_running_request_ends_before_its_coordinator(server: RedisServer) -> None:
    async def story(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["denoising"].work = gate
        await fleet.add_workers()
        coordinator, stub = await fleet.add_coordinator()
        call = stub.Generate(pb.GenerateRequest(request=submission()))
        replies = aiter(call)
        await anext(replies)
        await gate.wait_reached()
        stopping = asyncio.create_task(coordinator.stop(30))

        async def not_ready() -> bool:
            return not await ready(coordinator.address)

        await until(not_ready)
        with pytest.raises(grpc.aio.AioRpcError, match="shutting down") as caught:
            await stub.Submit(submission())
        assert error_of(caught.value)[0] == "UNAVAILABLE"
        gate.opened.set()
        rest = [reply async for reply in replies]
        assert rest[-1].data == b"\x07" * 100
        await stopping

    run_on_fleet(server.url, story)


async def _read_warnings(watch: AsyncIterable[pb.WatchResponse]) -> None:
    """Read to the end, or to an error; nobody serves the first stages, of which there may be a warning."""
    async for reply in watch:
        assert reply.event.HasField("warning")


def test_what_does_not_end_within_the_grace_time_goes_on_elsewhere(server: RedisServer) -> None:
    async def story(fleet: FakeFleet) -> None:
        leaving, stub = await fleet.add_coordinator()
        _, other = await fleet.add_coordinator(heartbeat_ttl_seconds=2.0)
        name = (await stub.Submit(submission())).request.request_id
        foreign = (await other.Submit(submission())).request.request_id
        watch = stub.Watch(pb.WatchRequest(request_id=foreign))
        await anext(aiter(watch))
        reading = asyncio.create_task(_read_warnings(watch))  # events that a client has not read hide how its call ends
        await leaving.stop(0)
        with pytest.raises(grpc.aio.AioRpcError, match="call again from the last event"):
            await reading
        assert await state_of(other, foreign) == pb.REQUEST_STATE_QUEUED
        await fleet.add_workers()
        for each in (name, foreign):
            assert (await terminal(other, each))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED
        async with connect(fleet.url) as redis:
            assert len(await redis.keys("fleet:coordinator:*")) == 1

    run_on_fleet(server.url, story)


def test_the_fleet_waits_for_a_store_that_is_away(server: RedisServer) -> None:
    async def story(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["denoising"].work = gate
        await fleet.add_workers()
        coordinator, stub = await fleet.add_coordinator()
        name = (await stub.Submit(submission())).request.request_id
        await gate.wait_reached()
        server.kill()
        with pytest.raises(grpc.aio.AioRpcError, match="store is unavailable") as caught:
            await stub.Submit(submission())
        assert error_of(caught.value)[0] == "UNAVAILABLE"

        async def not_ready() -> bool:
            return not await ready(coordinator.address)

        async def is_ready() -> bool:
            return await ready(coordinator.address)

        await until(not_ready)
        gate.opened.set()
        server.start()
        await until(is_ready)
        assert (await terminal(stub, name))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED

    run_on_fleet(server.url, story)


def test_a_coordinator_may_start_before_its_store(server: RedisServer) -> None:
    async def story(fleet: FakeFleet) -> None:
        server.kill()
        coordinator, stub = await fleet.add_coordinator()
        assert not await ready(coordinator.address)
        server.start()

        async def is_ready() -> bool:
            return await ready(coordinator.address)

        await until(is_ready)
        await fleet.add_workers()
        name = (await stub.Submit(submission())).request.request_id
        assert (await terminal(stub, name))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED

    run_on_fleet(server.url, story)


def test_artifacts_in_memory_are_bounded_and_forgotten(server: RedisServer) -> None:
    async def story(fleet: FakeFleet) -> None:
        await fleet.add_workers()
        coordinator, stub = await fleet.add_coordinator()
        memory = coordinator.artifact_memory
        name = (await stub.Submit(submission())).request.request_id
        assert (await terminal(stub, name))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED
        gc.collect()
        assert memory.used_bytes == 0
        _, tight = await fleet.add_coordinator(max_artifact_bytes=1_000_000)
        name = (await tight.Submit(submission())).request.request_id
        assert (await terminal(tight, name))[-1].state_change.error.code == "RESOURCE_EXHAUSTED"

    run_on_fleet(server.url, story)


def test_a_process_ends_well_on_sigterm(server: RedisServer) -> None:
    async def story(fleet: FakeFleet) -> None:
        process = await fleet.start_process(f"unix:{fleet.directory}/c.sock")
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
        async with connect(fleet.url) as redis:
            assert not await redis.keys("fleet:coordinator:*")

    run_on_fleet(server.url, story)


def test_a_coordinator_with_another_checkpoint_is_refused(server: RedisServer) -> None:
    async def story(fleet: FakeFleet) -> None:
        async with connect(fleet.url) as redis:
            await WorkerRegistry(redis, ttl_seconds=60).declare("emoji", "another")
        with pytest.raises(FailedPrecondition, match="fingerprint another"):
            await fleet.add_coordinator()

    run_on_fleet(server.url, story)


def test_two_models_of_one_name_are_refused() -> None:
    settings = CoordinatorSettings(listen="127.0.0.1:0")
    with pytest.raises(InvalidInput, match="one name"):
        asyncio.run(start_coordinator([MODEL, MODEL], settings))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--model", "mona-lisa"], "mona-lisa"),
        (["--redis", "http://x"], "http://x"),
        (["--queue-limit", "0"], "queue_limit"),
        (["--result-seconds", "9", "--record-seconds", "8"], "result_seconds"),
        (["--heartbeat-seconds", "9"], "heartbeat_seconds"),
        (["--listen", "nowhere"], "nowhere"),
    ],
)
def test_wrong_settings_end_with_one_line(words: list[str], reason: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("coordinator:")]
    assert len(lines) == 1
    assert reason in lines[0]
