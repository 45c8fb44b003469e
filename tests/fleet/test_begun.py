"""The frame which says that a call's stages start: when it is sent, to whom, and that it leaves before they run."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from async_tests import wait_until
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

# A worker whose stage kills its process as the first thing that it does.
SUICIDE = """
import asyncio, os, signal, sys
from stage_server import served

async def main():
    async with served(lambda x, call: os.kill(os.getpid(), signal.SIGKILL), listen=sys.argv[1]):
        print("serves", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


def test_it_comes_when_the_stages_start_and_not_before() -> None:
    gate = Gate()

    async def test(stage: Served) -> None:
        begun = [asyncio.Event(), asyncio.Event()]
        first = asyncio.create_task(stage.runner()(packets(), Call("first", on_begun=begun[0].set)))
        await begun[0].wait()
        second = asyncio.create_task(stage.runner()(packets(), Call("second", on_begun=begun[1].set)))

        async def both_are_there() -> bool:
            return stage.servicer.in_flight == 2

        await wait_until(both_are_there)
        assert not begun[1].is_set()
        gate.opened.set()
        await asyncio.gather(first, second)
        assert begun[1].is_set()

    run_served(test, gate, limits=ServicerLimits(capacity=2))


def test_only_callers_that_ask_get_it() -> None:
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


def test_a_reply_from_the_cache_begins_nothing() -> None:
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


def test_the_stage_starts_once_it_is_written() -> None:
    async def story() -> None:
        reporter = FrameReporter(denoising_pb2.DenoiseResponse, TORCH, begun=begun_frame(denoising_pb2.DenoiseResponse))
        started = threading.Event()

        def start() -> None:
            reporter.begin()
            started.set()

        starting = asyncio.create_task(asyncio.to_thread(start))
        frames = reporter.frames()
        assert await anext(frames) == BEGUN
        assert not started.wait(0.1)  # the frame is not written yet
        reporter.end()
        assert [frame async for frame in frames] == []
        await starting

    asyncio.run(asyncio.wait_for(story(), 30))


@pytest.mark.parametrize("ends_by", ["release", "time"])
def test_a_caller_that_reads_nothing_does_not_hold_the_device_up(ends_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter_module, "_LONGEST_BEGUN_SECONDS", 0.01 if ends_by == "time" else 3_600.0)

    async def story() -> None:
        reporter = FrameReporter(denoising_pb2.DenoiseResponse, TORCH, begun=BEGUN)
        starting = asyncio.create_task(asyncio.to_thread(reporter.begin))
        if ends_by == "release":
            reporter.release()
        await starting

    asyncio.run(asyncio.wait_for(story(), 30))


def test_a_stage_that_kills_its_process_at_once_has_begun(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/w.sock"

    async def story() -> None:
        words = (sys.executable, "-c", SUICIDE, address)
        process = await asyncio.create_subprocess_exec(
            *words, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[1]
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

    asyncio.run(asyncio.wait_for(story(), 60))
