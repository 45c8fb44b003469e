"""Take-over of requests from killed and stopped coordinators, and poison requests. Each request ends once."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import grpc
import pytest

from async_tests import wait_until
from common.errors import Unavailable
from common.rpc.client import open_channel
from common.stage import Call
from common.state.connection import command, connect
from common.state.requests import RequestStore
from coordinator_fleet import (
    FakeFleet,
    FakeWorker,
    Gate,
    Script,
    Stub,
    admit_late,
    error_of,
    run_on_fleet,
    submission,
    terminal,
)
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import generation_pb2_grpc
from redis_servers import RedisServer

TTL_SECONDS = 3.0
"""Heartbeat TTL of a coordinator that must keep its request until the test kills it, even on a busy host."""


class FirstCallGate(Gate):
    """A gate at which only the first call waits."""

    def __call__(self, call: Call) -> None:
        if self.reached.is_set():
            return
        super().__call__(call)


def ends(events: list[pb.Event]) -> list[pb.RequestState.ValueType]:
    """The terminal states in the events."""
    return [each.state_change.state for each in events if each.state_change.state >= pb.REQUEST_STATE_SUCCEEDED]


async def download(stub: Stub, request_id: str) -> bytes:
    return b"".join(
        [reply.data async for reply in stub.DownloadResult(pb.DownloadResultRequest(request_id=request_id))]
    )


def test_request_survives_the_loss_of_its_coordinator(each_server: RedisServer) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = FirstCallGate()
        fleet.scripts["denoising"].work = gate
        await fleet.add_workers()
        listen = f"unix:{fleet.directory}/c.sock"
        process = await fleet.start_process(listen, ttl_seconds=TTL_SECONDS)
        _, other = await fleet.add_coordinator(heartbeat_ttl_seconds=0.5)
        async with open_channel(listen) as channel:
            stub: Stub = generation_pb2_grpc.GenerationServiceStub(channel)
            call = stub.Generate(pb.GenerateRequest(request=submission()))
            replies = aiter(call)
            request_id = (await anext(replies)).accepted.request_id
            seen = [(await anext(replies)).event]
            await gate.wait_reached()
            process.kill()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                seen += [reply.event async for reply in replies]
            assert error_of(caught.value)[0] == "UNAVAILABLE"
        # The caller continues at another coordinator.
        watch = other.Watch(pb.WatchRequest(request_id=request_id, after_event_id=seen[-1].event_id))
        seen += [reply.event async for reply in watch]
        assert ends(seen) == [pb.REQUEST_STATE_SUCCEEDED]
        assert len({event.event_id for event in seen}) == len(seen)
        assert [event.event_id for event in seen] == [event.event_id for event in await terminal(other, request_id)]
        assert await download(other, request_id) == b"\x07" * 100
        assert fleet.scripts["denoising"].calls == [request_id, request_id]

    run_on_fleet(each_server.url, scenario)


def test_coordinator_that_continues_after_a_take_over_changes_nothing(each_server: RedisServer) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = FirstCallGate()
        fleet.scripts["decoding"].work = gate
        await fleet.add_workers()
        await fleet.add_worker("decoding")
        listen = f"unix:{fleet.directory}/c.sock"
        process = await fleet.start_process(listen)
        _, other = await fleet.add_coordinator(heartbeat_ttl_seconds=0.5)
        async with open_channel(listen) as channel:
            stub: Stub = generation_pb2_grpc.GenerationServiceStub(channel)
            request_id = (await stub.Submit(submission())).request.request_id
            await gate.wait_reached()
            process.send_signal(signal.SIGSTOP)
            events = await terminal(other, request_id)
            assert ends(events) == [pb.REQUEST_STATE_SUCCEEDED]
            gate.opened.set()  # the stopped coordinator's call ends, too
            process.send_signal(signal.SIGCONT)
            async with connect(fleet.url) as redis:

                async def no_worker_slot_is_taken() -> bool:
                    return not await redis.hlen("fleet:slots:emoji/decoding")

                await wait_until(no_worker_slot_is_taken)
            assert await terminal(stub, request_id) == events
            assert await download(stub, request_id) == b"\x07" * 100
            again = (await stub.Submit(submission())).request.request_id
            assert ends(await terminal(stub, again)) == [pb.REQUEST_STATE_SUCCEEDED]

    run_on_fleet(each_server.url, scenario)


def test_request_taken_over_twice_ends_once(each_server: RedisServer) -> None:
    """Another coordinator took the request over and was lost while this coordinator still ran the request."""

    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["denoising"].work = gate
        await fleet.add_workers()
        coordinator, stub = await fleet.add_coordinator()
        request_id = (await stub.Submit(submission())).request.request_id
        await gate.wait_reached()
        gate.reached.clear()
        async with connect(fleet.url) as redis:
            await command(redis, "HSET", f"fleet:request:{request_id}", "owner", "previous-coordinator", "epoch", 2)
            await gate.wait_reached()
            gate.opened.set()
            assert ends(await terminal(stub, request_id)) == [pb.REQUEST_STATE_SUCCEEDED]
            assert await command(redis, "HGET", f"fleet:request:{request_id}", "epoch") == b"3"
        assert fleet.scripts["denoising"].calls == [request_id, request_id]
        await coordinator.stop(5)
        assert not failed_tasks

    failed_tasks: list[object] = []

    async def watched(fleet: FakeFleet) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failed_tasks.append(context))
        await scenario(fleet)

    run_on_fleet(each_server.url, watched)


def test_late_admission_is_run(each_server: RedisServer) -> None:
    """A recovered network delivers an admission after its caller has received UNAVAILABLE."""

    async def scenario(fleet: FakeFleet) -> None:
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator()
        await admit_late(fleet, stub)
        assert ends(await terminal(stub, "late")) == [pb.REQUEST_STATE_SUCCEEDED]
        assert await download(stub, "late") == b"\x07" * 100

    run_on_fleet(each_server.url, scenario)


def test_result_survives_a_lost_reply_to_the_write_of_the_terminal_state(
    each_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator repeats the write, and must recognize its own first attempt."""
    finish = RequestStore.finish
    lost: list[str] = []

    async def finish_and_lose_the_reply(
        store: RequestStore, request_id: str, *more: Any, **named: Any
    ) -> list[pb.Event] | None:
        events = await finish(store, request_id, *more, **named)
        if not lost:
            lost.append(request_id)
            raise Unavailable("the reply is lost")
        return events

    async def scenario(fleet: FakeFleet) -> None:
        monkeypatch.setattr(RequestStore, "finish", finish_and_lose_the_reply)
        await fleet.add_workers()
        coordinator, stub = await fleet.add_coordinator()
        request_id = (await stub.Submit(submission())).request.request_id
        assert ends(await terminal(stub, request_id)) == [pb.REQUEST_STATE_SUCCEEDED]
        await coordinator.stop(5)  # the write is repeated before the stop
        assert lost == [request_id]
        _, other = await fleet.add_coordinator()
        assert await download(other, request_id) == b"\x07" * 100

    run_on_fleet(each_server.url, scenario)


def test_raw_result_without_a_caller_fails(each_server: RedisServer) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        listen = f"unix:{fleet.directory}/c.sock"
        process = await fleet.start_process(listen)
        async with open_channel(listen) as channel:
            stub: Stub = generation_pb2_grpc.GenerationServiceStub(channel)
            request = submission()
            request.parameters.output_format = pb.OUTPUT_FORMAT_SAFETENSORS
            replies = aiter(stub.Generate(pb.GenerateRequest(request=request)))
            request_id = (await anext(replies)).accepted.request_id
            process.kill()
            await process.wait()
        _, other = await fleet.add_coordinator(heartbeat_ttl_seconds=0.5)
        change = (await terminal(other, request_id))[-1].state_change
        assert change.state == pb.REQUEST_STATE_FAILED
        assert change.error.code == "UNAVAILABLE"
        assert "streamed" in change.error.message

    run_on_fleet(each_server.url, scenario)


class PoisonedDenoisers:
    """Denoisers that are lost when they run the request `poison`, and serve all other requests."""

    def __init__(self, fleet: FakeFleet) -> None:
        self.poison = ""
        self.lost: list[asyncio.Future[None]] = []
        self._fleet = fleet
        self._loop = asyncio.get_running_loop()

    async def add(self) -> None:
        """Add a denoiser."""
        script = Script(self._fleet.scripts["denoising"].contract)
        worker: FakeWorker = await self._fleet.add_worker("denoising", script)

        def work(call: Call) -> None:
            if call.request_id == self.poison:
                dying = asyncio.run_coroutine_threadsafe(worker.die(ttl_seconds=1.0), self._loop)
                self.lost.append(asyncio.wrap_future(dying, loop=self._loop))
                Gate()(call)

        script.work = work

    async def wait_lost(self, number: int) -> None:
        """Wait until `number` denoisers are lost."""
        await wait_until(lambda: len(self.lost) == number)


def test_poison_request_fails_after_three_lost_workers(each_server: RedisServer) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        denoisers = PoisonedDenoisers(fleet)
        await fleet.add_workers(["text_encoding", "latent_preparation", "decoding"])
        _, stub = await fleet.add_coordinator()
        denoisers.poison = (await stub.Submit(submission())).request.request_id
        for _ in range(4):
            await denoisers.add()
        change = (await terminal(stub, denoisers.poison))[-1].state_change
        assert change.state == pb.REQUEST_STATE_FAILED
        assert change.error.code == "INTERNAL"
        assert "3 workers were lost while they ran this request, without progress" in change.error.message
        assert "the last one at denoising" in change.error.message
        assert len(denoisers.lost) == 3
        innocent = (await stub.Submit(submission())).request.request_id
        assert ends(await terminal(stub, innocent)) == [pb.REQUEST_STATE_SUCCEEDED]
        await asyncio.gather(*denoisers.lost)

    run_on_fleet(each_server.url, scenario)


def test_take_over_inherits_losses(each_server: RedisServer) -> None:
    """The take-over itself is not a loss: the request fails with its third lost worker."""

    async def scenario(fleet: FakeFleet) -> None:
        denoisers = PoisonedDenoisers(fleet)
        await fleet.add_workers(["text_encoding", "latent_preparation", "decoding"])
        listen = f"unix:{fleet.directory}/c.sock"
        process = await fleet.start_process(listen)
        async with open_channel(listen) as channel:
            first: Stub = generation_pb2_grpc.GenerationServiceStub(channel)
            denoisers.poison = (await first.Submit(submission())).request.request_id
            for number in (1, 2):
                await denoisers.add()
                await denoisers.wait_lost(number)
            async with connect(fleet.url) as redis:

                async def both_losses_are_stored() -> bool:
                    deaths = await command(redis, "HGET", f"fleet:request:{denoisers.poison}", "deaths")
                    return len((deaths or b"").splitlines()) == 2

                await wait_until(both_losses_are_stored)
                process.kill()
                _, other = await fleet.add_coordinator(heartbeat_ttl_seconds=0.5)
                for _ in range(2):
                    await denoisers.add()
                change = (await terminal(other, denoisers.poison))[-1].state_change
                assert change.state == pb.REQUEST_STATE_FAILED
                assert "3 workers were lost" in change.error.message
                assert len(denoisers.lost) == 3
                assert int(await command(redis, "HGET", f"fleet:request:{denoisers.poison}", "epoch")) == 2
        await asyncio.gather(*denoisers.lost)

    run_on_fleet(each_server.url, scenario)


def test_request_survives_many_lost_coordinators(each_server: RedisServer) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["text_encoding"].work = gate
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator(heartbeat_ttl_seconds=0.5)
        request_id = (await stub.Submit(submission())).request.request_id
        await gate.wait_reached()
        async with connect(fleet.url) as redis:
            await command(redis, "HSET", f"fleet:request:{request_id}", "owner", "previous-coordinator", "epoch", 99)

            async def is_taken_over() -> bool:
                return bool(await command(redis, "HGET", f"fleet:request:{request_id}", "epoch") == b"100")

            await wait_until(is_taken_over)
            gate.opened.set()
            assert ends(await terminal(stub, request_id)) == [pb.REQUEST_STATE_SUCCEEDED]

    run_on_fleet(each_server.url, scenario)
