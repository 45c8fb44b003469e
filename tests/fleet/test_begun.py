"""The begun frame, which a worker sends on request before the stages of a call run."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from async_tests import HANG_SECONDS, run_bounded, wait_until
from common.errors import Unavailable
from common.rpc import frame_reporter as reporter_module
from common.rpc.client import RemoteRunner, WorkerLost, header_frame, open_channel
from common.rpc.frame_reporter import FrameReporter
from common.rpc.framing import chunk_frames
from common.rpc.method import BEGUN_KEY, begun_frame
from common.rpc.replies import ReplyCache
from common.rpc.stage_servicer import ServicerLimits
from common.stage import Call
from common.tensors import TORCH
from fleet.v1 import artifacts_pb2, denoising_pb2
from stage_server import METHOD, SERVICE, Gate, ScriptedStage, Served, packets, run_served

BEGUN = denoising_pb2.DenoiseResponse(begun=artifacts_pb2.Begun()).SerializeToString()

# A worker whose stage kills the worker process.
KILLED_WORKER = """
import asyncio, os, signal, sys
from stage_server import served

async def main():
    async with served(lambda x, call: os.kill(os.getpid(), signal.SIGKILL), listen=sys.argv[1]):
        print("serves", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


def test_begun_frame_is_sent_when_the_stages_start() -> None:
    gate = Gate()

    async def test(stage: Served) -> None:
        begun = [asyncio.Event(), asyncio.Event()]
        first = asyncio.create_task(stage.runner()(packets(), Call("first", on_begun=begun[0].set)))
        await begun[0].wait()
        second = asyncio.create_task(stage.runner()(packets(), Call("second", on_begun=begun[1].set)))

        async def both_are_in_flight() -> bool:
            return stage.servicer.in_flight == 2

        await wait_until(both_are_in_flight)
        assert not begun[1].is_set()
        gate.opened.set()
        await asyncio.gather(first, second)
        assert begun[1].is_set()

    run_served(test, gate, limits=ServicerLimits(capacity=2))


def test_begun_frame_is_sent_only_on_request() -> None:
    async def test(stage: Served) -> None:
        inputs = packets(4)
        chunks = [chunk for packet in inputs.values() for chunk in chunk_frames(packet.chunks)]
        frames = [header_frame(denoising_pb2.DenoiseRequest, inputs), *chunks]
        assert BEGUN not in await stage.raw_call(*frames)
        call: Any = stage.channel.stream_stream(METHOD)
        replies = [reply async for reply in call(iter(frames), metadata=((BEGUN_KEY, "1"),))]
        assert replies[0] == BEGUN
        assert BEGUN not in replies[1:]

    run_served(test)


def test_cached_reply_has_no_begun_frame() -> None:
    async def test(stage: Served) -> None:
        begun: list[None] = []
        runner = stage.runner()
        for _ in range(2):
            await runner(packets(), Call("r", on_begun=lambda: begun.append(None)))
        assert len(begun) == 1
        ((frames),) = cache._entries.values()
        assert BEGUN not in frames

    cache = ReplyCache(1 << 30, service=SERVICE, model="begun")
    run_served(test, cache=cache)


def test_stage_starts_after_the_begun_frame_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter_module, "_LONGEST_BEGUN_SECONDS", HANG_SECONDS)

    async def scenario() -> None:
        reporter = FrameReporter(denoising_pb2.DenoiseResponse, TORCH, begun=begun_frame(denoising_pb2.DenoiseResponse))
        started = threading.Event()

        def start() -> None:
            reporter.begin()
            started.set()

        starting = asyncio.create_task(asyncio.to_thread(start))
        frames = reporter.frames()
        assert await anext(frames) == BEGUN
        assert not started.wait(0.1), "the stage started before the frame was written"
        reporter.end()
        assert [frame async for frame in frames] == []
        await starting

    run_bounded(scenario)


@pytest.mark.parametrize("ends_by", ["release", "timeout"])
def test_caller_that_does_not_read_does_not_block_the_device(ends_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter_module, "_LONGEST_BEGUN_SECONDS", 0.01 if ends_by == "timeout" else 3_600.0)

    async def scenario() -> None:
        reporter = FrameReporter(denoising_pb2.DenoiseResponse, TORCH, begun=BEGUN)
        starting = asyncio.create_task(asyncio.to_thread(reporter.begin))
        if ends_by == "release":
            reporter.release()
        await starting

    run_bounded(scenario)


def test_stage_that_kills_its_process_has_sent_the_begun_frame(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/w.sock"

    async def scenario() -> None:
        command = (sys.executable, "-c", KILLED_WORKER, address)
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[1]
        )
        try:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"serves\n"
            begun = asyncio.Event()
            async with open_channel(address) as channel:
                runner = RemoteRunner(channel, SERVICE, ScriptedStage.contract)
                with pytest.raises(WorkerLost):
                    await runner(packets(), Call("r", on_begun=begun.set))
                assert begun.is_set()
                begun.clear()
                with pytest.raises(Unavailable):
                    await runner(packets(), Call("r", on_begun=begun.set))
                assert not begun.is_set()
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    run_bounded(scenario)
