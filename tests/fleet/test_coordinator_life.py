"""How a coordinator starts, waits for its store, shuts down, and what becomes of the requests of one that died."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.errors import FailedPrecondition, InvalidInput
from common.rpc.client import open_channel
from common.stage import Contract
from common.state.connection import connect
from common.state.workers import WorkerRegistry
from coordinator_fleet import FakeFleet, Gate, Stub, emoji, error_of, running_fleet, submission, terminal
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import generation_pb2_grpc
from redis_servers import RedisServer, running_server, server_binaries, until
from services.coordinator.__main__ import main
from services.coordinator.coordinator import start_coordinator
from services.coordinator.settings import CoordinatorSettings

MODEL = emoji()


@pytest.fixture(params=sorted(server_binaries()))
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with running_server(request.param) as server:
        yield server


def run(server: RedisServer, test: Callable[[FakeFleet], Awaitable[None]]) -> None:
    """Run a test on a fleet of its own."""

    async def whole() -> None:
        async with asyncio.timeout(60), running_fleet(server.url, MODEL) as fleet:
            await test(fleet)

    asyncio.run(whole())


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

    run(server, story)


def test_what_does_not_end_within_the_grace_time_fails(server: RedisServer) -> None:
    async def story(fleet: FakeFleet) -> None:
        leaving, stub = await fleet.add_coordinator()
        _, other = await fleet.add_coordinator()
        name = (await stub.Submit(submission())).request.request_id
        foreign = (await other.Submit(submission())).request.request_id
        watch = stub.Watch(pb.WatchRequest(request_id=foreign))
        await anext(aiter(watch))
        await leaving.stop(0)
        change = (await terminal(other, name))[-1].state_change
        assert change.error.code == "UNAVAILABLE"
        assert "shut down" in change.error.message
        with pytest.raises(grpc.aio.AioRpcError, match="watch again from the last event"):
            await anext(aiter(watch))
        assert await state_of(other, foreign) == pb.REQUEST_STATE_QUEUED
        async with connect(fleet.url) as redis:
            assert len(await redis.keys("fleet:coordinator:*")) == 1

    run(server, story)


def test_the_fleet_waits_for_a_store_that_is_away(server: RedisServer) -> None:
    async def story(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["denoising"].work = gate
        await fleet.add_workers()
        coordinator, stub = await fleet.add_coordinator()
        name = (await stub.Submit(submission())).request.request_id
        await gate.wait_reached()
        server.kill()
        with pytest.raises(grpc.aio.AioRpcError, match="store is away") as caught:
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

    run(server, story)


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

    run(server, story)


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

    run(server, story)


async def start_process(fleet: FakeFleet, listen: str) -> Process:
    """A coordinator as a process of its own, which listens."""
    words = ("--listen", listen, "--redis", fleet.url, "--heartbeat-seconds", "0.1", "--heartbeat-ttl-seconds", "0.5")
    command = (sys.executable, "-m", "services.coordinator", *words, "--log-level", "ERROR")
    process = await asyncio.create_subprocess_exec(*command, stdout=DEVNULL, stderr=PIPE)
    assert process.stderr is not None
    assert b"listens on" in await process.stderr.readline()
    return process


def test_requests_of_a_killed_coordinator_end_as_failed(server: RedisServer) -> None:
    async def story(fleet: FakeFleet) -> None:
        listen = f"unix:{fleet.directory}/c.sock"
        process = await start_process(fleet, listen)
        async with open_channel(listen) as channel:
            stub: Stub = generation_pb2_grpc.GenerationServiceStub(channel)
            name = (await stub.Submit(submission())).request.request_id
        process.kill()
        await process.wait()
        _, other = await fleet.add_coordinator(heartbeat_ttl_seconds=0.5)
        change = (await terminal(other, name))[-1].state_change
        assert change.state == pb.REQUEST_STATE_FAILED
        assert change.error.code == "UNAVAILABLE"

    run(server, story)


def test_a_process_ends_well_on_sigterm(server: RedisServer) -> None:
    async def story(fleet: FakeFleet) -> None:
        process = await start_process(fleet, f"unix:{fleet.directory}/c.sock")
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
        async with connect(fleet.url) as redis:
            assert not await redis.keys("fleet:coordinator:*")

    run(server, story)


def test_a_coordinator_with_another_checkpoint_is_refused(server: RedisServer) -> None:
    async def story(fleet: FakeFleet) -> None:
        async with connect(fleet.url) as redis:
            await WorkerRegistry(redis, ttl_seconds=60).declare(
                "emoji", "another", {"denoising": Contract("x", {}, {})}
            )
        with pytest.raises(FailedPrecondition, match="fingerprint another"):
            await fleet.add_coordinator()

    run(server, story)


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
