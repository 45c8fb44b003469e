"""SIGKILL of the worker that denoises, at the first, a middle and the last step: the picture stays the same bytes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from common.rpc.client import open_channel
from common.state.connection import command, connect
from common.state.workers import WorkerRegistry
from coordinator_fleet import Stub, emoji
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import generation_pb2_grpc
from redis_servers import RedisServer, running_server, until
from services.coordinator.coordinator import start_coordinator
from services.coordinator.settings import CoordinatorSettings
from services.worker import WorkerSettings, start_worker

MODEL = emoji()
STEPS = 8
SIZE = 512  # pixels; so large that a step takes longer than its progress needs to arrive here
KILLED_AT = (1, STEPS // 2, STEPS - 1)


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with running_server("valkey") as server:
        yield server


async def _denoiser(url: str, listen: str) -> Process:
    words = ("--model", "emoji", "--redis", url, "--listen", listen, "--threads", "1", "--checkpoint-every", "1")
    told = ("--step-seconds", "0", "--log-level", "ERROR")
    command = (sys.executable, "-m", "services.denoising", *words, "--device", "cpu", *told)
    return await asyncio.create_subprocess_exec(*command)


async def _end(process: Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


@asynccontextmanager
async def fleet(url: str, directory: Path) -> AsyncIterator[Stub]:
    """Denoisers as processes, one more than are killed; all else in this process."""
    async with AsyncExitStack() as stack:
        for number in range(len(KILLED_AT) + 1):
            stack.push_async_callback(_end, await _denoiser(url, f"unix:{directory}/d{number}.sock"))
        for service in ("text_encoding", "latent_preparation", "decoding"):
            listen = f"unix:{directory}/{service}.sock"
            settings = WorkerSettings(model="emoji", redis=url, listen=listen, device="cpu", threads=1)
            worker = await start_worker(service, MODEL, settings)
            stack.push_async_callback(worker.stop, 0)
        listen = f"unix:{directory}/c.sock"
        coordinator = await start_coordinator(
            [MODEL], CoordinatorSettings(listen=listen, redis=url, step_seconds=0.0, heartbeat_seconds=0.2)
        )
        stack.push_async_callback(coordinator.stop, 0)
        channel = await stack.enter_async_context(open_channel(listen))
        redis = await stack.enter_async_context(connect(url))

        async def complete() -> bool:
            return len(await WorkerRegistry(redis).live("emoji", "denoising")) == len(KILLED_AT) + 1

        await until(complete)
        yield generation_pb2_grpc.GenerationServiceStub(channel)


async def kill_the_busy_one(url: str) -> None:
    """SIGKILL the process that has the slot; a worker's name tells its process id."""
    async with connect(url) as redis:
        (slot,) = await command(redis, "HVALS", "fleet:slots:emoji/denoising")
    os.kill(int(slot.decode().partition("|")[0].split("-")[-2]), signal.SIGKILL)


async def draw(stub: Stub, url: str, kill_at: int = 0) -> tuple[bytes, list[int]]:
    """A picture, and the denoiser's steps as they were told; at step `kill_at` its worker is killed."""
    request = pb.SubmitRequest(
        parameters=pb.GenerationParameters(
            prompt="a red apple", seed=3, num_inference_steps=STEPS, height=SIZE, width=SIZE
        )
    )
    name = (await stub.Submit(request)).request.request_id
    steps: list[int] = []
    last = pb.StateChange()
    async for reply in stub.Watch(pb.WatchRequest(request_id=name)):
        last = reply.event.state_change
        if reply.event.progress.service == "denoising":
            steps.append(reply.event.progress.step)
            if kill_at and steps[-1] >= kill_at:
                await kill_the_busy_one(url)
                kill_at = 0
    assert last.state == pb.REQUEST_STATE_SUCCEEDED, last
    download = stub.DownloadResult(pb.DownloadResultRequest(request_id=name))
    return b"".join([reply.data async for reply in download]), steps


def test_a_killed_denoiser_changes_no_byte(server: RedisServer, tmp_path: Path) -> None:
    async def story() -> None:
        async with asyncio.timeout(150), fleet(server.url, tmp_path) as stub, connect(server.url) as redis:
            whole, steps = await draw(stub, server.url)
            assert whole.startswith(b"\x89PNG")
            assert steps.count(0) == 1
            for kill_at in KILLED_AT:
                again, steps = await draw(stub, server.url, kill_at)
                assert again == whole
                assert steps.count(0) == 2, steps
                resumed_at = steps[steps.index(0, 1) + 1]
                assert resumed_at > kill_at, steps
            assert not await redis.keys("fleet:checkpoint:*")

    asyncio.run(story())
