"""Start and shutdown of a coordinator, with and without its store."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import AsyncIterable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from async_tests import wait_until
from common.errors import FailedPrecondition, InvalidInput
from common.rpc.client import open_channel
from common.state.connection import connect
from common.state.workers import WorkerRegistry
from coordinator_fleet import FakeFleet, Gate, Stub, emoji, error_of, run_on_fleet, submission, terminal
from fleet.v1 import generation_pb2 as pb
from redis_servers import RedisServer
from services.coordinator.__main__ import main
from services.coordinator.coordinator import start_coordinator
from services.coordinator.settings import CoordinatorSettings

MODEL = emoji()


async def ready(address: str) -> bool:
    async with open_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest(service="fleet.v1.GenerationService"))
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def state_of(stub: Stub, name: str) -> pb.RequestState.ValueType:
    return (await stub.GetRequest(pb.GetRequestRequest(request_id=name))).request.state


def test_coordinator_stops_after_its_running_request_has_ended(each_server: RedisServer) -> None:
    async def scenario(fleet: FakeFleet) -> None:
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

        await wait_until(not_ready)
        with pytest.raises(grpc.aio.AioRpcError, match="shutting down") as caught:
            await stub.Submit(submission())
        assert error_of(caught.value)[0] == "UNAVAILABLE"
        gate.opened.set()
        rest = [reply async for reply in replies]
        assert rest[-1].data == b"\x07" * 100
        await stopping

    run_on_fleet(each_server.url, scenario)


async def _read_warnings(watch: AsyncIterable[pb.WatchResponse]) -> None:
    """Read to the end or to an error. Each event is a warning, because the stages have no workers."""
    async for reply in watch:
        assert reply.event.HasField("warning")


def test_requests_continue_on_another_coordinator_after_the_grace_period(each_server: RedisServer) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        leaving, stub = await fleet.add_coordinator()
        _, other = await fleet.add_coordinator(heartbeat_ttl_seconds=2.0)
        name = (await stub.Submit(submission())).request.request_id
        name_of_other = (await other.Submit(submission())).request.request_id
        watch = stub.Watch(pb.WatchRequest(request_id=name_of_other))
        await anext(aiter(watch))
        reading = asyncio.create_task(_read_warnings(watch))  # a call has a status only after its last event is read
        await leaving.stop(0)
        with pytest.raises(grpc.aio.AioRpcError, match="repeat the call from the last event"):
            await reading
        assert await state_of(other, name_of_other) == pb.REQUEST_STATE_QUEUED
        await fleet.add_workers()
        for each in (name, name_of_other):
            assert (await terminal(other, each))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED
        async with connect(fleet.url) as redis:
            assert len(await redis.keys("fleet:coordinator:*")) == 1

    run_on_fleet(each_server.url, scenario)


def test_requests_continue_after_the_store_was_unavailable(each_server: RedisServer) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["denoising"].work = gate
        await fleet.add_workers()
        coordinator, stub = await fleet.add_coordinator()
        name = (await stub.Submit(submission())).request.request_id
        await gate.wait_reached()
        each_server.kill()
        with pytest.raises(grpc.aio.AioRpcError, match="store is unavailable") as caught:
            await stub.Submit(submission())
        assert error_of(caught.value)[0] == "UNAVAILABLE"

        async def not_ready() -> bool:
            return not await ready(coordinator.address)

        async def is_ready() -> bool:
            return await ready(coordinator.address)

        await wait_until(not_ready)
        gate.opened.set()
        each_server.start()
        await wait_until(is_ready)
        assert (await terminal(stub, name))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED

    run_on_fleet(each_server.url, scenario)


def test_coordinator_may_start_before_its_store(each_server: RedisServer) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        each_server.kill()
        coordinator, stub = await fleet.add_coordinator()
        assert not await ready(coordinator.address)
        each_server.start()

        async def is_ready() -> bool:
            return await ready(coordinator.address)

        await wait_until(is_ready)
        await fleet.add_workers()
        name = (await stub.Submit(submission())).request.request_id
        assert (await terminal(stub, name))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED

    run_on_fleet(each_server.url, scenario)


def test_artifacts_in_memory_are_bounded_and_released(each_server: RedisServer) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers()
        coordinator, stub = await fleet.add_coordinator()
        memory = coordinator.artifact_memory
        name = (await stub.Submit(submission())).request.request_id
        assert (await terminal(stub, name))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED

        async def all_are_released() -> bool:
            gc.collect()
            return memory.used_bytes == 0

        await wait_until(all_are_released)
        _, tight = await fleet.add_coordinator(max_artifact_bytes=1_000_000)
        name = (await tight.Submit(submission())).request.request_id
        assert (await terminal(tight, name))[-1].state_change.error.code == "RESOURCE_EXHAUSTED"

    run_on_fleet(each_server.url, scenario)


def test_process_exits_with_0_on_sigterm(each_server: RedisServer) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        process = await fleet.start_process(f"unix:{fleet.directory}/c.sock")
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
        async with connect(fleet.url) as redis:
            assert not await redis.keys("fleet:coordinator:*")

    run_on_fleet(each_server.url, scenario)


def test_coordinator_with_another_checkpoint_is_refused(each_server: RedisServer) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        async with connect(fleet.url) as redis:
            await WorkerRegistry(redis, ttl_seconds=60).declare("emoji", "another")
        with pytest.raises(FailedPrecondition, match="fingerprint another"):
            await fleet.add_coordinator()

    run_on_fleet(each_server.url, scenario)


def test_models_with_equal_names_are_refused() -> None:
    settings = CoordinatorSettings(listen="127.0.0.1:0")
    with pytest.raises(InvalidInput, match="the same name"):
        asyncio.run(start_coordinator([MODEL, MODEL], settings))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "mona-lisa"], "mona-lisa"),
        (["--redis", "http://x"], "http://x"),
        (["--queue-limit", "0"], "queue_limit"),
        (["--result-seconds", "9", "--record-seconds", "8"], "result_seconds"),
        (["--heartbeat-seconds", "9"], "heartbeat_seconds"),
        (["--listen", "nowhere"], "nowhere"),
    ],
)
def test_invalid_settings_are_reported_in_one_line(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("coordinator:")]
    assert len(lines) == 1
    assert message in lines[0]
