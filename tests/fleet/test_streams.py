"""Streams between stages: the same items from both runners, read while they are made, within bounds of memory."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import grpc
import pytest
import torch

from common.artifacts import MediaItem, StepCheckpoint
from common.codec import pack, unpack
from common.errors import Cancelled, InternalError, InvalidInput
from common.local import HostedStages, LocalRunner
from common.pipeline import Runner, run_pipeline
from common.rpc.client import RemoteRunner, header_frame, open_channel
from common.rpc.fleet_server import FleetServer
from common.rpc.items import item_frames
from common.rpc.method import path_of, request_type, stage_method
from common.rpc.stage_servicer import ServicerLimits, StageServicer
from common.rpc.status import from_rpc_error
from common.rpc.watchdog import HangLimits, Watchdog
from common.stage import STEP_CHECKPOINTS, Call
from common.streams import DeviceLock, ItemBuffer
from common.tensors import TORCH
from step_checkpoints import Sink
from stream_stages import Gate, Hook, consumer, do_nothing, latents_of, producer, request, text_of

BLOCKS = 5


@dataclasses.dataclass
class Served:
    """A stage behind a server."""

    hosted: HostedStages
    servicer: StageServicer
    channel: grpc.aio.Channel

    def runner(self) -> RemoteRunner:
        """A runner that calls it."""
        return RemoteRunner(self.channel, self.hosted.contract.name, self.hosted.contract)


@asynccontextmanager
async def served(hosted: HostedStages, capacity: int = 2, watchdog: Watchdog | None = None) -> AsyncIterator[Served]:
    """Serve stages."""
    service = hosted.contract.name
    with ThreadPoolExecutor(1) as executor:
        server = FleetServer("127.0.0.1:0")
        limits = ServicerLimits(capacity=capacity)
        servicer = StageServicer(service, hosted, executor, TORCH, limits=limits, watchdog=watchdog)
        server.add(servicer.methods, servicer.service_name)
        address = await server.start()
        await server.set_ready(True)
        async with open_channel(address) as channel:
            try:
                yield Served(hosted, servicer, channel)
            finally:
                await server.drain(0)
                await asyncio.to_thread(servicer.close)


def packed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {slot: pack(slot, artifact, TORCH) for slot, artifact in values.items()}


def unpacked(items: tuple[Any, ...]) -> tuple[MediaItem, ...]:
    return tuple(unpack("media_items", MediaItem, packet, TORCH) for packet in items)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def timed() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(timed())


async def local(values: Mapping[str, Any], call: Call, *hooks: Hook) -> tuple[MediaItem, ...]:
    """The pipeline in this process."""
    before_block, before_item = hooks or (do_nothing, do_nothing)
    device = DeviceLock()
    with ThreadPoolExecutor(1) as executor:
        stages = producer(before_block), consumer(before_item)
        runners: list[Runner] = [LocalRunner(each, executor, device) for each in stages]
        outputs = await run_pipeline(runners, values, call, wanted=("media_items",))
    items: tuple[MediaItem, ...] = outputs["media_items"]
    return items


@asynccontextmanager
async def remote(*hooks: Hook, **more: Any) -> AsyncIterator[tuple[Served, Served]]:
    """Both stages behind servers of their own."""
    before_block, before_item = hooks or (do_nothing, do_nothing)
    async with AsyncExitStack() as stack:
        made = await stack.enter_async_context(served(producer(before_block), **more))
        read = await stack.enter_async_context(served(consumer(before_item), **more))
        yield made, read


async def through(services: tuple[Served, Served], values: Mapping[str, Any], call: Call) -> tuple[MediaItem, ...]:
    """The pipeline through both servers."""
    runners: list[Runner] = [each.runner() for each in services]
    outputs = await run_pipeline(runners, packed(values), call, wanted=("media_items",))
    return unpacked(outputs["media_items"])


@pytest.mark.parametrize("count", [16, 1 << 18, 3 << 20])
def test_both_runners_give_the_same_items_checkpoints_and_progress(count: int) -> None:
    """Small items ride in their frames, large ones follow in one chunk or several."""

    async def test() -> None:
        heard: dict[str, list[Any]] = {"local": [], "remote": []}

        def call(name: str) -> Call:
            states = Sink(heard[name].append)
            return Call("r", sinks={STEP_CHECKPOINTS: states}, on_warning=lambda *_: pytest.fail("a warning"))

        values = request(BLOCKS, count)
        near = text_of(await local(values, call("local")))
        async with remote() as services:
            far = text_of(await through(services, values, call("remote")))
        assert near == far
        assert near.count(b"\n") == BLOCKS
        ours = [state.step for state in heard["local"]]
        theirs = [unpack("checkpoint", StepCheckpoint, state, TORCH).step for state in heard["remote"]]
        assert ours == [*range(1, BLOCKS + 1)]
        assert theirs[-1] == BLOCKS  # Those that were replaced while they waited are not sent.
        assert theirs == sorted(set(theirs))

    run(test)


@pytest.mark.parametrize("place", ["local", "remote"])
def test_the_first_item_is_read_before_the_second_is_made(place: str) -> None:
    async def test() -> None:
        first_read = threading.Event()

        def before_block(index: int, call: Call) -> None:
            call.check_cancelled()
            with call.waiting():  # The device belongs to the reader meanwhile.
                assert index != 1 or first_read.wait(30), "the reader waits for the end of the stream"

        def before_item(_: int, call: Call) -> None:
            call.check_cancelled()
            first_read.set()

        if place == "local":
            items = await local(request(), Call("r"), before_block, before_item)
        else:
            async with remote(before_block, before_item) as services:
                items = await through(services, request(), Call("r"))
        assert len(items) == BLOCKS

    run(test)


def test_a_slow_reader_holds_its_writer_up_within_a_bound() -> None:
    """Through both servers: what is emitted and not read is bounded by the buffers on the way, not by the stream."""

    async def test() -> None:
        gate, made = Gate(0), []
        blocks, count = 16, 4 << 20  # 16 MiB a block

        def before_block(index: int, call: Call) -> None:
            call.check_cancelled()
            made.append(index)

        async with remote(before_block, gate) as services:
            running = asyncio.create_task(through(services, request(blocks, count), Call("r")))
            await asyncio.to_thread(gate.entered.wait, 30)
            settled = -1
            while settled != len(made):
                settled = len(made)
                await asyncio.sleep(1.0)
            assert settled < 12, f"{settled} of {blocks} blocks were made while the reader stood still"
            gate.opened.set()
            assert len(await running) == blocks

    run(test)


@pytest.mark.parametrize("place", ["local", "remote"])
def test_an_error_of_the_reader_ends_the_writer(place: str) -> None:
    async def test() -> None:
        in_vain: list[int] = []

        def before_block(index: int, call: Call) -> None:
            with call.waiting():
                if index == 2 and not call.cancelled.wait(20):
                    in_vain.append(index)
            call.check_cancelled()

        def before_item(_: int, __: Call) -> None:
            raise InvalidInput("too dark", field="canvas")

        async with remote(before_block, before_item) as services:
            work = through(services, request(), Call("r"))
            with pytest.raises(InvalidInput, match="too dark"):
                await (work if place == "remote" else local(request(), Call("r"), before_block, before_item))
            work.close()
        assert not in_vain, "the writer waited for a cancel that never came"

    run(test)


def test_a_cancelled_session_leaves_its_place_and_its_thread() -> None:
    """Also one that waits for an item that never comes."""

    async def test() -> None:
        async with served(consumer(), capacity=1) as service:
            for _ in range(2):
                stream = ItemBuffer()
                values = {**packed({"canvas": request()["canvas"]}), "denoised_blocks": stream}
                await stream.put(0, pack("denoised_blocks", request()["initial_latents"], TORCH), 1)
                taken = asyncio.Event()
                sink = Sink(partial(_set, taken))
                call = Call("r", sinks={"media_items": sink})
                running = asyncio.create_task(service.runner()(values, call))
                await taken.wait()
                running.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await running
            await service.runner()({**values, "denoised_blocks": _ended()}, Call("r", sinks={"media_items": sink}))

    run(test)


def _set(event: asyncio.Event, _: object) -> None:
    event.set()


def _ended() -> ItemBuffer:
    """A stream without items."""
    stream = ItemBuffer()
    stream.close()
    return stream


def test_sessions_share_their_device_item_by_item() -> None:
    """Two streams on one worker: while one waits for its second item, the other one is decoded to its end."""

    async def test() -> None:
        async with served(consumer(), capacity=2) as service:
            waiting, values = ItemBuffer(), request()
            block = pack("denoised_blocks", values["initial_latents"], TORCH)
            inputs = packed({"canvas": values["canvas"]})
            await waiting.put(0, block, block.byte_size)
            first = ItemBuffer()
            slow = asyncio.create_task(
                service.runner()({**inputs, "denoised_blocks": waiting}, Call("slow", sinks={"media_items": first}))
            )
            await first.wait_for_first()
            whole, second = ItemBuffer(), ItemBuffer()
            for index in range(BLOCKS):
                await whole.put(index, block, block.byte_size)
            whole.close()
            await service.runner()({**inputs, "denoised_blocks": whole}, Call("fast", sinks={"media_items": second}))
            assert not slow.done()
            waiting.close()
            await slow

    run(test)


def test_a_watchdog_does_not_judge_a_stage_that_waits_for_its_reader_or_its_writer() -> None:
    """Both wait for longer than a stuck stage may be without a step."""

    async def test() -> None:
        watchdog = Watchdog(HangLimits(seconds=0.2, mean_steps=1.0, exit_seconds=60.0))
        async with served(consumer(), watchdog=watchdog) as service:
            stream, items = ItemBuffer(), ItemBuffer()
            block = pack("denoised_blocks", latents_of(request()["initial_latents"].parts["video"].latents), TORCH)
            values = {**packed({"canvas": request()["canvas"]}), "denoised_blocks": stream}
            call = Call("r", sinks={"media_items": items})
            running = asyncio.create_task(service.runner()(values, call))
            for index in range(3):
                await stream.put(index, block, block.byte_size)
                await asyncio.sleep(0.8)
            stream.close()
            await running

    run(test)


async def frames_refused(service: Served, *frames: bytes) -> Exception:
    """The error that a session answers these frames with."""
    path = path_of(stage_method("decoding"))
    open_call: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = service.channel.stream_stream(path)
    try:
        async for _ in open_call(iter(frames), metadata=(("fleet-items", "1"),)):
            pass
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    raise AssertionError("the frames were accepted")


def test_wrong_items_are_named() -> None:
    async def test() -> None:
        frame = request_type(stage_method("decoding"))
        values = request(count=1 << 18)
        header = header_frame(frame, packed({"canvas": values["canvas"]}))
        block = pack("denoised_blocks", values["initial_latents"], TORCH)
        item, chunk = list(item_frames(frame, "denoised_blocks", 0, block))[:2]
        small = pack("denoised_blocks", latents_of(torch.zeros(4)), TORCH)
        (whole,) = item_frames(frame, "denoised_blocks", 0, small)
        (later,) = item_frames(frame, "denoised_blocks", 2, small)
        (other,) = item_frames(frame, "media_items", 0, small)
        state = StepCheckpoint(step=1, latents=latents_of(torch.zeros(4)))
        (wrong,) = item_frames(frame, "denoised_blocks", 0, pack("denoised_blocks", state, TORCH))
        async with served(consumer(), capacity=4) as service:
            for frames, says in (
                ((item, header), "neither header nor chunk"),
                ((header, header), "neither item nor chunk"),
                ((header, chunk), "no item announces"),
                ((header, item, item), "starts before"),
                ((header, item), "ended within item 0"),
                ((header, whole, later), "item 2 of denoised_blocks was received instead of 1"),
                ((header, other), "no stream of this call"),
                ((header, wrong), "has denoise_state"),
            ):
                error = await frames_refused(service, *frames)
                assert isinstance(error, InvalidInput), says
                assert says in str(error)

    run(test)


def test_a_caller_that_reads_no_items_is_refused_where_the_answer_is_a_stream() -> None:
    async def test() -> None:
        async with served(producer()) as service:
            method = stage_method("denoising")
            header = header_frame(request_type(method), packed(request(count=4)))
            open_call: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = service.channel.stream_stream(path_of(method))
            with pytest.raises(grpc.aio.AioRpcError, match="fleet-items: 1"):
                async for _ in open_call(iter([header])):
                    pass

    run(test)


def test_an_item_buffer_ignores_what_it_has_and_refuses_a_gap() -> None:
    async def test() -> None:
        buffer = ItemBuffer()
        await buffer.put(0, "a", 1)
        await buffer.put(0, "other", 1)
        with pytest.raises(InternalError, match="item 2 of a stream was received instead of item 1"):
            await buffer.put(2, "c", 1)
        buffer.close()
        assert [item async for item, _ in buffer.read()] == ["a"]
        assert [item async for item, _ in buffer.read()] == ["a"], "a second reader begins again"
        assert [item async for item, _ in buffer.read(forgets=True)] == ["a"]
        assert [item async for item, _ in buffer.read()] == [None], "it keeps what nobody will read again"

    run(test)


def test_a_cancelled_reader_in_this_process_ends() -> None:
    async def test() -> None:
        hosted, stream = consumer(), ItemBuffer()
        call = Call("r")
        with ThreadPoolExecutor(1) as executor:
            runner = LocalRunner(hosted, executor)
            values = {"canvas": request()["canvas"], "denoised_blocks": stream}
            running = asyncio.create_task(runner(values, call))
            await asyncio.sleep(0.1)
            call.cancelled.set()
            with pytest.raises(Cancelled):
                await running

    run(test)
