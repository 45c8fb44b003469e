"""Streams between stages. Local and remote runners deliver equal items one by one, in bounded memory."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import grpc
import pytest
import torch

from async_tests import HANG_SECONDS, run_bounded, wait_until
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
        """A runner that calls the stage."""
        return RemoteRunner(self.channel, self.hosted.contract.name, self.hosted.contract)


@asynccontextmanager
async def served(hosted: HostedStages, capacity: int = 2, watchdog: Watchdog | None = None) -> AsyncIterator[Served]:
    """Serve stages until the context exits."""
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


async def run_local(values: Mapping[str, Any], call: Call, *hooks: Hook) -> tuple[MediaItem, ...]:
    """Run the pipeline in this process."""
    before_block, before_item = hooks or (do_nothing, do_nothing)
    device = DeviceLock()
    with ThreadPoolExecutor(1) as executor:
        stages = producer(before_block), consumer(before_item)
        runners: list[Runner] = [LocalRunner(each, executor, device) for each in stages]
        outputs = await run_pipeline(runners, values, call, wanted=("media_items",))
    items: tuple[MediaItem, ...] = outputs["media_items"]
    return items


@asynccontextmanager
async def served_pipeline(*hooks: Hook, **more: Any) -> AsyncIterator[tuple[Served, Served]]:
    """Serve both stages, each behind its own server."""
    before_block, before_item = hooks or (do_nothing, do_nothing)
    async with AsyncExitStack() as stack:
        writer = await stack.enter_async_context(served(producer(before_block), **more))
        reader = await stack.enter_async_context(served(consumer(before_item), **more))
        yield writer, reader


async def run_remote(services: tuple[Served, Served], values: Mapping[str, Any], call: Call) -> tuple[MediaItem, ...]:
    """Run the pipeline through both servers."""
    runners: list[Runner] = [each.runner() for each in services]
    outputs = await run_pipeline(runners, packed(values), call, wanted=("media_items",))
    return unpacked(outputs["media_items"])


@pytest.mark.parametrize("count", [16, 1 << 18, 3 << 20])
def test_both_runners_return_equal_items_and_the_last_step_checkpoint(count: int) -> None:
    """Small items are inline in their frames; large items follow in chunks."""

    async def test() -> None:
        recorded: dict[str, list[Any]] = {"local": [], "remote": []}

        def call(name: str) -> Call:
            states = Sink(recorded[name].append)
            return Call("r", sinks={STEP_CHECKPOINTS: states}, on_warning=lambda *_: pytest.fail("a warning"))

        values = request(BLOCKS, count)
        local = text_of(await run_local(values, call("local")))
        async with served_pipeline() as services:
            remote = text_of(await run_remote(services, values, call("remote")))
        assert local == remote
        assert local.count(b"\n") == BLOCKS
        ours = [state.step for state in recorded["local"]]
        theirs = [unpack("checkpoint", StepCheckpoint, state, TORCH).step for state in recorded["remote"]]
        assert ours == [*range(1, BLOCKS + 1)]
        assert theirs[-1] == BLOCKS  # a newer step checkpoint replaces an unsent step checkpoint
        assert theirs == sorted(set(theirs))

    run_bounded(test)


@pytest.mark.parametrize("runner", ["local", "remote"])
def test_first_item_is_read_before_the_second_is_computed(runner: str) -> None:
    async def test() -> None:
        first_read = threading.Event()

        def before_block(index: int, call: Call) -> None:
            call.check_cancelled()
            with call.waiting():  # the reader may use the device
                assert index != 1 or first_read.wait(HANG_SECONDS), "the reader waits for the end of the stream"

        def before_item(_: int, call: Call) -> None:
            call.check_cancelled()
            first_read.set()

        if runner == "local":
            items = await run_local(request(), Call("r"), before_block, before_item)
        else:
            async with served_pipeline(before_block, before_item) as services:
                items = await run_remote(services, request(), Call("r"))
        assert len(items) == BLOCKS

    run_bounded(test)


def test_slow_reader_blocks_its_writer_once_buffers_are_full() -> None:
    """Through both servers: unread items are bounded by the buffers' sizes, not by the stream's length."""

    async def test() -> None:
        gate, made = Gate(0), []
        blocks, count = 16, 4 << 20  # 16 MiB per block

        def before_block(index: int, call: Call) -> None:
            call.check_cancelled()
            made.append(index)

        async with served_pipeline(before_block, gate) as services:
            running = asyncio.create_task(run_remote(services, request(blocks, count), Call("r")))
            await asyncio.to_thread(gate.entered.wait, 30)
            settled = -1
            while settled != len(made):
                settled = len(made)
                await asyncio.sleep(1.0)
            assert settled < 12, f"{settled} of {blocks} blocks were computed while the reader waited"
            gate.opened.set()
            assert len(await running) == blocks

    run_bounded(test)


@pytest.mark.parametrize("runner", ["local", "remote"])
def test_error_of_the_reader_cancels_the_writer(runner: str) -> None:
    async def test() -> None:
        timed_out: list[int] = []

        def before_block(index: int, call: Call) -> None:
            with call.waiting():
                if index == 2 and not call.cancelled.wait(HANG_SECONDS):
                    timed_out.append(index)
            call.check_cancelled()

        def before_item(_: int, __: Call) -> None:
            raise InvalidInput("too dark", field="canvas")

        async with served_pipeline(before_block, before_item) as services:
            work = run_remote(services, request(), Call("r"))
            with pytest.raises(InvalidInput, match="too dark"):
                await (work if runner == "remote" else run_local(request(), Call("r"), before_block, before_item))
            work.close()
        assert not timed_out, "the writer was not cancelled"

    run_bounded(test)


def test_cancelled_session_frees_its_worker_slot_and_its_thread() -> None:
    """The session is cancelled while it waits for an item."""

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
                # The server learns of the cancellation later than the client.
                await wait_until(lambda: service.servicer.in_flight == 0)
            await service.runner()(
                {**values, "denoised_blocks": _empty_stream()}, Call("r", sinks={"media_items": sink})
            )

    run_bounded(test)


def _set(event: asyncio.Event, _: object) -> None:
    event.set()


def _empty_stream() -> ItemBuffer:
    """A stream without items."""
    stream = ItemBuffer()
    stream.close()
    return stream


def test_sessions_share_their_device_item_by_item() -> None:
    """Two streams on one worker. While one stream waits for its second item, the other is decoded completely."""

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

    run_bounded(test)


def test_watchdog_ignores_time_spent_waiting_for_items() -> None:
    """The stage waits for longer than hang_seconds, which no step of the stage takes, even on a busy host."""

    async def test() -> None:
        watchdog = Watchdog(HangLimits(seconds=2.0, mean_steps=1.0, exit_seconds=60.0))
        async with served(consumer(), watchdog=watchdog) as service:
            stream, items = ItemBuffer(), ItemBuffer()
            block = pack("denoised_blocks", latents_of(request()["initial_latents"].parts["video"].latents), TORCH)
            values = {**packed({"canvas": request()["canvas"]}), "denoised_blocks": stream}
            call = Call("r", sinks={"media_items": items})
            running = asyncio.create_task(service.runner()(values, call))
            await stream.put(0, block, block.byte_size)
            await items.wait_for_first()
            await asyncio.sleep(3.0)
            await stream.put(1, block, block.byte_size)
            stream.close()
            await running

    run_bounded(test)


async def refusal_of(service: Served, *frames: bytes) -> Exception:
    """The error of a session with these frames."""
    path = path_of(stage_method("decoding"))
    open_call: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = service.channel.stream_stream(path)
    try:
        async for _ in open_call(iter(frames), metadata=(("fleet-items", "1"),)):
            pass
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error)
    raise AssertionError("the frames were accepted")


def test_invalid_item_frames_are_refused() -> None:
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
            for frames, message in (
                ((item, header), "neither header nor chunk"),
                ((header, header), "neither item nor chunk"),
                ((header, chunk), "no item describes"),
                ((header, item, item), "starts before"),
                ((header, item), "denoised_blocks: the call ended within item 0"),
                ((header, whole, later), "denoised_blocks: item 2 was received instead of item 1"),
                ((header, other), "no stream of this call"),
                ((header, wrong), "denoised_blocks: denoise_state is not latents, its artifact"),
            ):
                error = await refusal_of(service, *frames)
                assert isinstance(error, InvalidInput), message
                assert message in str(error)

    run_bounded(test)


def test_caller_without_item_support_is_refused_by_streaming_stages() -> None:
    async def test() -> None:
        async with served(producer()) as service:
            method = stage_method("denoising")
            header = header_frame(request_type(method), packed(request(count=4)))
            open_call: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = service.channel.stream_stream(path_of(method))
            with pytest.raises(grpc.aio.AioRpcError, match="fleet-items: 1"):
                async for _ in open_call(iter([header])):
                    pass

    run_bounded(test)


def test_item_buffer_ignores_repeated_items_and_refuses_gaps() -> None:
    async def test() -> None:
        buffer = ItemBuffer()
        await buffer.put(0, "a", 1)
        await buffer.put(0, "other", 1)
        with pytest.raises(InternalError, match="item 2 of a stream was received instead of item 1"):
            await buffer.put(2, "c", 1)
        buffer.close()
        assert [item async for item, _ in buffer.read()] == ["a"]
        assert [item async for item, _ in buffer.read()] == ["a"], "a second reader does not start at the first item"
        assert [item async for item, _ in buffer.read(forgets=True)] == ["a"]
        assert [item async for item, _ in buffer.read()] == [None], "released items are retained"

    run_bounded(test)


def test_cancelled_local_reader_ends() -> None:
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

    run_bounded(test)
