"""A streamed video survives lost coordinators and decoders. Bytes are equal; each item is delivered once."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from async_tests import HANG_SECONDS, run_bounded, wait_until
from common.artifacts import MediaItem, StepCheckpoint
from common.rpc.client import open_channel
from common.stage import Call
from common.state.connection import connect
from common.state.requests import RequestStore
from coordinator_fleet import FakeFleet, FakeWorker, Script, Stub, error_of, latents_of, running_fleet, terminal
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import generation_pb2_grpc
from models.catalog import open_model
from models.registry import load_registry
from services.cli import client as cli
from services.cli.client import RequestFailed
from services.cli.drawing import draw
from services.cli.progress import LineReporter

ITEMS = 4
MODEL = open_model("emoji-video", load_registry())
TTL_SECONDS = 3.0
"""Heartbeat TTL of a coordinator that must keep its request until the test signals it, even on a busy host."""


def item_bytes(index: int) -> bytes:
    """Item `index` of the video; large items are sent and stored in chunks."""
    return bytes([index + 1]) * (3 + index * 700_000)


VIDEO = b"".join(map(item_bytes, range(ITEMS)))


@dataclass
class VideoScript(Script):
    """A decoder. Its first call waits before item `stop_before` until `opened` is set or the call is cancelled."""

    stop_before: int = ITEMS + 1
    stopped: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def run(self, values: Mapping[str, Any], call: Call) -> dict[str, Any]:
        """Emit the items of one file."""
        assert "denoised_latents" in values
        self.calls.append(call.request_id)
        is_first = len(self.calls) == 1
        for index in range(ITEMS + 1):
            if is_first and index == self.stop_before:
                self.stopped.set()
                while not self.opened.wait(0.005):
                    call.check_cancelled()
            call.check_cancelled()
            if index < ITEMS:
                data = torch.tensor(list(item_bytes(index)[:1]), dtype=torch.uint8).repeat(len(item_bytes(index)))
                part = MediaItem(data=data, content_type="video/mp4", height=64, width=64, num_frames=4)
                call.emit("media_items", part, index)
        return {}


class LoopScript(Script):
    """A denoiser that sends a step checkpoint of step 3, and records the first step of each call."""

    def __init__(self, common: Script, first_steps: list[int]) -> None:
        super().__init__(common.contract)
        self.first_steps = first_steps

    def run(self, values: Mapping[str, Any], call: Call) -> dict[str, Any]:
        """Send the step checkpoint unless the call resumes, and return the outputs of the common script."""
        resumed = values.get("resume_from")
        self.first_steps.append(resumed.step if resumed else 0)
        if not resumed:
            call.checkpoint(StepCheckpoint(step=3, latents=latents_of(torch.zeros(1, 4))))
        return super().run(values, call)


class Case:
    """A fleet whose decoder is a VideoScript."""

    def __init__(self, fleet: FakeFleet, stop_before: int) -> None:
        self.fleet = fleet
        self.script = VideoScript(fleet.scripts["decoding"].contract, stop_before=stop_before)
        fleet.scripts["decoding"] = self.script
        self.listen = f"unix:{fleet.directory}/c.sock"

    async def start_process(self, ttl_seconds: float = 0.5) -> asyncio.subprocess.Process:
        return await self.fleet.start_process(self.listen, "--model", MODEL.name, ttl_seconds=ttl_seconds)

    async def add_workers(self, numerics: str = "") -> list[FakeWorker]:
        return [await self.fleet.add_worker(service, numerics=numerics) for service in self.fleet.scripts]

    async def wait_stopped(self) -> None:
        assert await asyncio.to_thread(self.script.stopped.wait, HANG_SECONDS)

    async def check(self, request_id: str) -> list[int]:
        """Check the stored video, and that each item was delivered once. Returns the items' epochs."""
        async with connect(self.fleet.url) as redis:
            store = RequestStore(redis)
            record = await store.get(request_id)
            assert record.state == pb.REQUEST_STATE_SUCCEEDED
            (header,) = record.files
            assert (header.byte_size, header.num_items, header.num_frames) == (len(VIDEO), ITEMS, 4 * ITEMS)
            items = await store.delivered_items(request_id)
            assert [stored.item.item_index for stored in items] == list(range(ITEMS))
            data = [b"".join([each async for each in store.items.chunks(request_id, stored)]) for stored in items]
            assert data == [item_bytes(index) for index in range(ITEMS)]
            return [stored.epoch for stored in items]


def run_on_video_fleet(url: str, test: Callable[[Case], Awaitable[None]], stop_before: int = ITEMS + 1) -> None:
    async def on_fleet() -> None:
        async with running_fleet(url, MODEL) as fleet:
            case = Case(fleet, stop_before)
            await test(case)
            case.script.opened.set()

    run_bounded(on_fleet)


def submission(**fields: Any) -> pb.SubmitRequest:
    return pb.SubmitRequest(parameters=pb.GenerationParameters(prompt="an apple"), **fields)


async def follow(stub: Stub, request_id: str, received: list[bytes]) -> list[pb.FileHeader]:
    """Download a growing file and check offsets; returns the headers."""
    headers: list[pb.FileHeader] = []
    request = pb.DownloadResultRequest(request_id=request_id, index=0, follow=True)
    async for response in stub.DownloadResult(request):
        if response.HasField("file"):
            headers.append(response.file)
        else:
            assert response.file_data.offset == sum(map(len, received))
            received.append(response.file_data.data)
    return headers


async def wait_until_received(received: list[bytes], size: int) -> None:
    async def are_received() -> bool:
        return sum(map(len, received)) >= size

    await wait_until(are_received)


def bytes_before(stop_before: int) -> int:
    """Total size of the items before `stop_before`."""
    return sum(len(item_bytes(index)) for index in range(min(stop_before, ITEMS)))


def test_video_is_streamed_and_stored(store_url: str) -> None:
    async def test(case: Case) -> None:
        await case.add_workers()
        _, stub = await case.fleet.add_coordinator()
        replies = aiter(stub.Generate(pb.GenerateRequest(request=submission(), follow=True)))
        request_id = (await anext(replies)).accepted.request_id
        received = b""
        while len(received) < bytes_before(2):
            received += (await anext(replies)).file_data.data
        await case.wait_stopped()  # the other items are not generated yet
        case.script.opened.set()
        rest = [each async for each in replies]
        assert received + b"".join(each.file_data.data for each in rest) == VIDEO
        assert (rest[-1].file.byte_size, rest[-1].file.is_growing) == (len(VIDEO), False)
        assert await case.check(request_id) == [1] * ITEMS
        whole = [each async for each in stub.Generate(pb.GenerateRequest(request=submission()))]
        kinds = [each.WhichOneof("payload") for each in whole]
        assert kinds.index("file") > max(index for index, kind in enumerate(kinds) if kind == "event")
        assert "file_data" not in kinds
        assert b"".join(each.data for each in whole) == VIDEO

    run_on_video_fleet(store_url, test, stop_before=2)


@pytest.mark.parametrize("stop_before", [0, 1, 3, ITEMS])
def test_download_at_another_coordinator_survives_the_owners_loss(store_url: str, stop_before: int) -> None:
    async def test(case: Case) -> None:
        await case.add_workers()
        process = await case.start_process(TTL_SECONDS)
        _, other = await case.fleet.add_coordinator(heartbeat_ttl_seconds=0.5)
        async with open_channel(case.listen) as channel:
            stub: Stub = generation_pb2_grpc.GenerationServiceStub(channel)
            request_id = (await stub.Submit(submission())).request.request_id
            received: list[bytes] = []
            following = asyncio.create_task(follow(other, request_id, received))
            await case.wait_stopped()
            await wait_until_received(received, bytes_before(stop_before))
            process.kill()
            headers = await following
        assert b"".join(received) == VIDEO
        assert (headers[0].is_growing, headers[-1].byte_size) == (True, len(VIDEO))
        epochs = await case.check(request_id)
        assert epochs[:stop_before] == [1] * stop_before
        assert all(epoch > 1 for epoch in epochs[stop_before:])
        events = await terminal(other, request_id)
        assert [each.item.item_index for each in events if each.HasField("item")] == list(range(ITEMS))

    run_on_video_fleet(store_url, test, stop_before)


@pytest.mark.parametrize(("stop_before", "resumed_at"), [(0, 0), (2, 3)])
def test_take_over_with_other_numerics_resumes_after_an_item(store_url: str, stop_before: int, resumed_at: int) -> None:
    """After a delivered item, the loop resumes even with other numerics. A restart would change delivered bytes."""

    async def test(case: Case) -> None:
        first_steps: list[int] = []
        case.fleet.scripts["denoising"] = LoopScript(case.fleet.scripts["denoising"], first_steps)
        workers = {each.info.service: each for each in await case.add_workers(numerics="a")}
        process = await case.start_process()
        async with open_channel(case.listen) as channel:
            stub: Stub = generation_pb2_grpc.GenerationServiceStub(channel)
            request_id = (await stub.Submit(submission())).request.request_id
            received: list[bytes] = []
            await case.wait_stopped()
            following = asyncio.create_task(follow(stub, request_id, received))
            await wait_until_received(received, bytes_before(stop_before))
            process.kill()
            with pytest.raises(grpc.aio.AioRpcError):
                await following
        await workers["denoising"].withdraw()
        await case.fleet.add_worker("denoising", numerics="b")
        _, other = await case.fleet.add_coordinator(heartbeat_ttl_seconds=0.5)
        await terminal(other, request_id)
        await case.check(request_id)
        assert first_steps == [0, resumed_at]

    run_on_video_fleet(store_url, test, stop_before)


def test_coordinator_that_continues_after_a_take_over_delivers_nothing(store_url: str) -> None:
    async def test(case: Case) -> None:
        await case.add_workers()
        await case.fleet.add_worker("decoding")
        process = await case.start_process(TTL_SECONDS)
        _, other = await case.fleet.add_coordinator(heartbeat_ttl_seconds=0.5)
        async with open_channel(case.listen) as channel:
            stub: Stub = generation_pb2_grpc.GenerationServiceStub(channel)
            request_id = (await stub.Submit(submission())).request.request_id
            received: list[bytes] = []
            following = asyncio.create_task(follow(other, request_id, received))
            await case.wait_stopped()
            await wait_until_received(received, bytes_before(2))
            process.send_signal(signal.SIGSTOP)
            await following
            case.script.opened.set()  # the stopped coordinator's decoder emits items 2 and 3, too
            process.send_signal(signal.SIGCONT)
            own = [each async for each in stub.DownloadResult(pb.DownloadResultRequest(request_id=request_id))]
        assert b"".join(received) == b"".join(each.data for each in own) == VIDEO
        epochs = await case.check(request_id)
        assert epochs[:2] == [1, 1]
        assert min(epochs[2:]) > 1

    run_on_video_fleet(store_url, test, stop_before=2)


@pytest.mark.parametrize("stop_before", [0, 2, ITEMS])
def test_command_continues_after_its_coordinator_restarts(
    store_url: str,
    stop_before: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The coordinator restarts at the same address, and its request continues."""

    async def short_pause(_: int) -> None:
        await asyncio.sleep(0.3)

    monkeypatch.setattr("services.cli.client.pause", short_pause)
    monkeypatch.setattr("services.cli.client.RETRIES", 100)

    async def test(case: Case) -> None:
        await case.add_workers()
        process = await case.start_process()
        output = tmp_path / "x.mp4"
        async with cli.connect(case.listen) as client:
            drawing = asyncio.create_task(draw(client, submission(), output, LineReporter()))
            await case.wait_stopped()

            async def is_written() -> bool:
                return stop_before == 0 or (output.exists() and output.stat().st_size == bytes_before(stop_before))

            await wait_until(is_written)
            process.kill()
            await process.wait()
            await case.start_process()
            assert await drawing == [output]

    run_on_video_fleet(store_url, test, stop_before)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [VIDEO]
    assert "continues; the connection was lost" in capsys.readouterr().err


@pytest.mark.parametrize("stop_before", [2, ITEMS])
def test_no_item_is_delivered_twice_after_a_lost_decoder(store_url: str, stop_before: int) -> None:
    async def test(case: Case) -> None:
        workers = await case.add_workers()
        _, stub = await case.fleet.add_coordinator()
        request_id = (await stub.Submit(submission())).request.request_id
        received: list[bytes] = []
        following = asyncio.create_task(follow(stub, request_id, received))
        await case.wait_stopped()
        await wait_until_received(received, bytes_before(stop_before))
        await case.fleet.add_worker("decoding")
        await workers[-1].die()
        await following
        assert b"".join(received) == VIDEO
        assert len(case.script.calls) == 2
        assert await case.check(request_id) == [1] * ITEMS

    run_on_video_fleet(store_url, test, stop_before)


def test_cancelled_request_ends_its_downloads(store_url: str, tmp_path: Path) -> None:
    async def test(case: Case) -> None:
        await case.add_workers()
        coordinator, stub = await case.fleet.add_coordinator()
        async with cli.connect(coordinator.address) as client:
            drawing = asyncio.create_task(draw(client, submission(), tmp_path / "x.mp4", LineReporter()))
            await case.wait_stopped()
            request_id = case.script.calls[0]
            received: list[bytes] = []
            following = asyncio.create_task(follow(stub, request_id, received))
            await wait_until_received(received, bytes_before(2))
            await client.cancel(request_id)
            with pytest.raises(grpc.aio.AioRpcError, match="CANCELLED; only a request that SUCCEEDED") as caught:
                await following
            assert error_of(caught.value)[0] == "FAILED_PRECONDITION"
            with pytest.raises(RequestFailed, match="was cancelled"):
                await drawing
        async with connect(case.fleet.url) as redis:
            for key in await redis.keys("fleet:item:*"):
                assert 0 < await redis.pttl(key) <= 60_000

    run_on_video_fleet(store_url, test, stop_before=2)
    assert not list(tmp_path.iterdir())


def test_result_larger_than_max_result_bytes_fails(store_url: str) -> None:
    async def test(case: Case) -> None:
        await case.add_workers()
        _, stub = await case.fleet.add_coordinator(max_result_bytes=bytes_before(3))
        request_id = (await stub.Submit(submission())).request.request_id
        events = await terminal(stub, request_id)
        error = events[-1].state_change.error
        assert (error.code, error.field) == ("RESOURCE_EXHAUSTED", "num_frames")
        assert [each.item.item_index for each in events if each.HasField("item")] == [0, 1, 2]

    run_on_video_fleet(store_url, test)


def test_raw_stream_is_sent_and_never_stored(store_url: str) -> None:
    async def test(case: Case) -> None:
        await case.add_workers()
        _, stub = await case.fleet.add_coordinator()
        request = submission()
        request.parameters.output_format = pb.OUTPUT_FORMAT_SAFETENSORS
        for follows in (False, True):
            replies = [each async for each in stub.Generate(pb.GenerateRequest(request=request, follow=follows))]
            assert b"".join(each.file_data.data if follows else each.data for each in replies) == VIDEO
            assert not [each for each in replies if each.event.HasField("item")]
        async with connect(case.fleet.url) as redis:
            assert not await redis.keys("fleet:item:*")

    run_on_video_fleet(store_url, test)
