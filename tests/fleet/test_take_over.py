"""Coordinators that die, sleep or leave: another one goes on with their requests, and each still ends once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

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
    emoji,
    error_of,
    run_on_fleet,
    submission,
    terminal,
)
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import generation_pb2_grpc
from redis_servers import RedisServer, running_server, server_binaries, until

MODEL = emoji()


@pytest.fixture(params=sorted(server_binaries()))
def server(request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    with running_server(request.param) as server:
        yield server


class SecondGate(Gate):
    """Lets the first call wait until it is cancelled, and later ones pass."""

    def __call__(self, call: Call) -> None:
        if self.reached.is_set():
            return
        super().__call__(call)


def ends(events: list[pb.Event]) -> list[pb.RequestState.ValueType]:
    """The terminal states among the events; there must be one."""
    return [each.state_change.state for each in events if each.state_change.state >= pb.REQUEST_STATE_SUCCEEDED]


async def download(stub: Stub, name: str) -> bytes:
    return b"".join([reply.data async for reply in stub.DownloadResult(pb.DownloadResultRequest(request_id=name))])


def test_a_request_outlives_its_coordinator(server: RedisServer) -> None:
    async def story(fleet: FakeFleet) -> None:
        gate = SecondGate()
        fleet.scripts["denoising"].work = gate
        await fleet.add_workers()
        listen = f"unix:{fleet.directory}/c.sock"
        process = await fleet.start_process(listen)
        _, other = await fleet.add_coordinator(heartbeat_ttl_seconds=0.5)
        async with open_channel(listen) as channel:
            stub: Stub = generation_pb2_grpc.GenerationServiceStub(channel)
            call = stub.Generate(pb.GenerateRequest(request=submission()))
            replies = aiter(call)
            name = (await anext(replies)).accepted.request_id
            seen = [(await anext(replies)).event]
            await gate.wait_reached()
            process.kill()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                seen += [reply.event async for reply in replies]
            assert error_of(caught.value)[0] == "UNAVAILABLE"
        # The caller has lost its coordinator, not its request.
        watch = other.Watch(pb.WatchRequest(request_id=name, after_event_id=seen[-1].event_id))
        seen += [reply.event async for reply in watch]
        assert ends(seen) == [pb.REQUEST_STATE_SUCCEEDED]
        assert len({event.event_id for event in seen}) == len(seen)
        assert [event.event_id for event in seen] == [event.event_id for event in await terminal(other, name)]
        assert await download(other, name) == b"\x07" * 100
        assert fleet.scripts["denoising"].calls == [name, name]

    run_on_fleet(server.url, story)


def test_a_coordinator_that_slept_does_no_harm(server: RedisServer) -> None:
    async def story(fleet: FakeFleet) -> None:
        gate = SecondGate()
        fleet.scripts["decoding"].work = gate
        await fleet.add_workers()
        await fleet.add_worker("decoding")
        listen = f"unix:{fleet.directory}/c.sock"
        process = await fleet.start_process(listen)
        _, other = await fleet.add_coordinator(heartbeat_ttl_seconds=0.5)
        async with open_channel(listen) as channel:
            stub: Stub = generation_pb2_grpc.GenerationServiceStub(channel)
            name = (await stub.Submit(submission())).request.request_id
            await gate.wait_reached()
            process.send_signal(signal.SIGSTOP)
            events = await terminal(other, name)
            assert ends(events) == [pb.REQUEST_STATE_SUCCEEDED]
            gate.opened.set()  # the sleeper's call ends too
            process.send_signal(signal.SIGCONT)
            async with connect(fleet.url) as redis:

                async def idle() -> bool:
                    return not await redis.hlen("fleet:slots:emoji/decoding")

                await until(idle)
            assert await terminal(stub, name) == events
            assert await download(stub, name) == b"\x07" * 100
            again = (await stub.Submit(submission())).request.request_id
            assert ends(await terminal(stub, again)) == [pb.REQUEST_STATE_SUCCEEDED]

    run_on_fleet(server.url, story)


def test_a_request_that_comes_back_is_run_once(server: RedisServer) -> None:
    """Another coordinator took it over and died, while this one was still at it."""

    async def story(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["denoising"].work = gate
        await fleet.add_workers()
        coordinator, stub = await fleet.add_coordinator()
        name = (await stub.Submit(submission())).request.request_id
        await gate.wait_reached()
        gate.reached.clear()
        async with connect(fleet.url) as redis:
            await command(redis, "HSET", f"fleet:request:{name}", "owner", "coordinator-of-before", "epoch", 2)
            await gate.wait_reached()
            gate.opened.set()
            assert ends(await terminal(stub, name)) == [pb.REQUEST_STATE_SUCCEEDED]
            assert await command(redis, "HGET", f"fleet:request:{name}", "epoch") == b"3"
        assert fleet.scripts["denoising"].calls == [name, name]
        await coordinator.stop(5)
        assert not failed_tasks

    failed_tasks: list[object] = []

    async def watched(fleet: FakeFleet) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failed_tasks.append(context))
        await story(fleet)

    run_on_fleet(server.url, watched)


def test_a_request_that_arrives_after_its_coordinator_gave_up_is_run(server: RedisServer) -> None:
    """A network that comes back delivers an admission whose caller heard long ago that the store is away."""

    async def story(fleet: FakeFleet) -> None:
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator()
        known = (await stub.Submit(submission())).request
        await terminal(stub, known.request_id)
        async with connect(fleet.url) as redis:
            owner = await command(redis, "HGET", f"fleet:request:{known.request_id}", "owner")
            late = pb.RequestRecord(request_id="late", model=known.model, parameters=known.parameters)
            stored = pb.SubmitRequest(model=known.model, parameters=known.parameters).SerializeToString()
            await RequestStore(redis, owner=owner.decode()).admit(late, submission=stored)
        assert ends(await terminal(stub, "late")) == [pb.REQUEST_STATE_SUCCEEDED]
        assert await download(stub, "late") == b"\x07" * 100

    run_on_fleet(server.url, story)


def test_an_end_whose_answer_is_lost_keeps_its_result(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator writes the end down again, and must not take its own first attempt for somebody else's."""
    finish = RequestStore.finish
    lost: list[str] = []

    async def finish_in_silence(
        store: RequestStore, request_id: str, *more: Any, **named: Any
    ) -> list[pb.Event] | None:
        events = await finish(store, request_id, *more, **named)
        if not lost:
            lost.append(request_id)
            raise Unavailable("the answer is lost")
        return events

    async def story(fleet: FakeFleet) -> None:
        monkeypatch.setattr(RequestStore, "finish", finish_in_silence)
        await fleet.add_workers()
        coordinator, stub = await fleet.add_coordinator()
        name = (await stub.Submit(submission())).request.request_id
        assert ends(await terminal(stub, name)) == [pb.REQUEST_STATE_SUCCEEDED]
        await coordinator.stop(5)  # it has written the end down again by then
        assert lost == [name]
        _, other = await fleet.add_coordinator()
        assert await download(other, name) == b"\x07" * 100

    run_on_fleet(server.url, story)


def test_a_raw_result_without_its_caller_ends_as_failed(server: RedisServer) -> None:
    async def story(fleet: FakeFleet) -> None:
        listen = f"unix:{fleet.directory}/c.sock"
        process = await fleet.start_process(listen)
        async with open_channel(listen) as channel:
            stub: Stub = generation_pb2_grpc.GenerationServiceStub(channel)
            request = submission()
            request.parameters.output_format = pb.OUTPUT_FORMAT_SAFETENSORS
            replies = aiter(stub.Generate(pb.GenerateRequest(request=request)))
            name = (await anext(replies)).accepted.request_id
            process.kill()
            await process.wait()
        _, other = await fleet.add_coordinator(heartbeat_ttl_seconds=0.5)
        change = (await terminal(other, name))[-1].state_change
        assert change.state == pb.REQUEST_STATE_FAILED
        assert change.error.code == "UNAVAILABLE"
        assert "streamed" in change.error.message

    run_on_fleet(server.url, story)


class Mortals:
    """Denoisers that die at once of one request, and serve every other one."""

    def __init__(self, fleet: FakeFleet) -> None:
        self.poison = ""
        self.died: list[asyncio.Future[None]] = []
        self._fleet = fleet
        self._loop = asyncio.get_running_loop()

    async def add(self) -> None:
        """One more of them."""
        script = Script(self._fleet.scripts["denoising"].contract)
        worker: FakeWorker = await self._fleet.add_worker("denoising", script, ttl_seconds=0.5)

        def work(call: Call) -> None:
            if call.request_id == self.poison:
                dying = asyncio.run_coroutine_threadsafe(worker.die(), self._loop)
                self.died.append(asyncio.wrap_future(dying, loop=self._loop))
                Gate()(call)

        script.work = work

    async def count(self, number: int) -> None:
        """Wait until so many have died."""

        async def so_many() -> bool:
            return len(self.died) == number

        await until(so_many)


def test_a_request_that_kills_workers_is_given_up(server: RedisServer) -> None:
    async def story(fleet: FakeFleet) -> None:
        mortals = Mortals(fleet)
        await fleet.add_workers(["text_encoding", "latent_preparation", "decoding"])
        _, stub = await fleet.add_coordinator()
        mortals.poison = (await stub.Submit(submission())).request.request_id
        for _ in range(4):
            await mortals.add()
        change = (await terminal(stub, mortals.poison))[-1].state_change
        assert change.state == pb.REQUEST_STATE_FAILED
        assert change.error.code == "INTERNAL"
        assert "3 workers were lost while they ran this request, without progress" in change.error.message
        assert "the last one at denoising" in change.error.message
        assert len(mortals.died) == 3
        innocent = (await stub.Submit(submission())).request.request_id
        assert ends(await terminal(stub, innocent)) == [pb.REQUEST_STATE_SUCCEEDED]
        await asyncio.gather(*mortals.died)

    run_on_fleet(server.url, story)


def test_a_take_over_inherits_the_losses(server: RedisServer) -> None:
    """And is none: only the third loss ends the request."""

    async def story(fleet: FakeFleet) -> None:
        mortals = Mortals(fleet)
        await fleet.add_workers(["text_encoding", "latent_preparation", "decoding"])
        listen = f"unix:{fleet.directory}/c.sock"
        process = await fleet.start_process(listen)
        async with open_channel(listen) as channel:
            first: Stub = generation_pb2_grpc.GenerationServiceStub(channel)
            mortals.poison = (await first.Submit(submission())).request.request_id
            for number in (1, 2):
                await mortals.add()
                await mortals.count(number)
            async with connect(fleet.url) as redis:

                async def both_are_stored() -> bool:
                    deaths = await command(redis, "HGET", f"fleet:request:{mortals.poison}", "deaths")
                    return len((deaths or b"").splitlines()) == 2

                await until(both_are_stored)
                process.kill()
                _, other = await fleet.add_coordinator(heartbeat_ttl_seconds=0.5)
                for _ in range(2):
                    await mortals.add()
                change = (await terminal(other, mortals.poison))[-1].state_change
                assert change.state == pb.REQUEST_STATE_FAILED
                assert "3 workers were lost" in change.error.message
                assert len(mortals.died) == 3
                assert int(await command(redis, "HGET", f"fleet:request:{mortals.poison}", "epoch")) == 2
        await asyncio.gather(*mortals.died)

    run_on_fleet(server.url, story)


def test_however_many_coordinators_die_the_request_goes_on(server: RedisServer) -> None:
    async def story(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["text_encoding"].work = gate
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator(heartbeat_ttl_seconds=0.5)
        name = (await stub.Submit(submission())).request.request_id
        await gate.wait_reached()
        async with connect(fleet.url) as redis:
            await command(redis, "HSET", f"fleet:request:{name}", "owner", "coordinator-of-before", "epoch", 99)

            async def is_taken_over() -> bool:
                return bool(await command(redis, "HGET", f"fleet:request:{name}", "epoch") == b"100")

            await until(is_taken_over)
            gate.opened.set()
            assert ends(await terminal(stub, name)) == [pb.REQUEST_STATE_SUCCEEDED]

    run_on_fleet(server.url, story)
