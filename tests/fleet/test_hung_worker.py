"""A worker whose device hangs during a request exits, and the request resumes on another worker."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from async_tests import HANG_SECONDS
from common.process_exit import TEMPORARY_FAILURE
from common.rpc.client import open_channel
from common.state.connection import command, connect
from coordinator_fleet import Stub
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import generation_pb2_grpc
from models.catalog import ServedModel, open_model
from models.registry import load_registry
from redis_servers import running_server
from services.coordinator.coordinator import start_coordinator
from services.coordinator.settings import CoordinatorSettings
from services.worker import start_worker
from services.worker_settings import LoopSettings
from toy_checkpoint import build_toy_checkpoint, toy_family

SLOW_SEED, STUCK_SEED = 7, 8
STEPS = 4

# With seed 7, each step takes longer than hang_seconds. With seed 8, the first process hangs after two steps.
_STUCK_STAGE = f"""

class _Stuck(ToyDenoisingStage):
    def run(self, x, call):
        import dataclasses, os, threading, time

        def progress(step, total_steps):
            if x.sampling.seed == {SLOW_SEED}:
                time.sleep(1.3)
            call.on_progress(step, total_steps)
            if x.sampling.seed == {STUCK_SEED} and step == 2:
                try:
                    os.close(os.open("MARKER", os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    return
                threading.Event().wait()

        return super().run(x, dataclasses.replace(call, on_progress=progress))


ToyDenoisingStage = _Stuck
"""
_HANGS = ("--hang-seconds", "1", "--hang-exit-seconds", "0.5")


class Fleet:
    """A fleet of the toy family. One denoiser is a separate process; other workers run in this process."""

    def __init__(
        self, stub: Stub, redis_url: str, model: ServedModel, plugins: Path, denoiser: Process, stack: AsyncExitStack
    ) -> None:
        self.stub = stub
        self.denoiser = denoiser
        self._redis_url = redis_url
        self._model = model
        self._plugins = plugins
        self._stack = stack

    async def start(self, service: str, directory: Path) -> None:
        """Start a worker in this process."""
        listen = f"unix:{directory}/{service}.sock"
        settings = LoopSettings(
            model="toy",
            redis=self._redis_url,
            listen=listen,
            plugins=(self._plugins,),
            device="cpu",
            threads=1,
            step_seconds=0.0,
        )
        worker = await start_worker(service, self._model, settings)
        self._stack.push_async_callback(worker.stop, 0)

    async def submit(self, seed: int) -> str:
        """Submit a request; returns its id."""
        parameters = pb.GenerationParameters(prompt="red", seed=seed, num_inference_steps=STEPS)
        return (await self.stub.Submit(pb.SubmitRequest(parameters=parameters))).request.request_id

    async def result(self, name: str) -> tuple[bytes, list[int]]:
        """The file of a successful request, and the denoiser's reported steps."""
        last, steps = pb.StateChange(), []
        async for reply in self.stub.Watch(pb.WatchRequest(request_id=name)):
            last = reply.event.state_change
            if reply.event.progress.service == "denoising":
                steps.append(reply.event.progress.step)
        assert last.state == pb.REQUEST_STATE_SUCCEEDED, last
        download = self.stub.DownloadResult(pb.DownloadResultRequest(request_id=name))
        return b"".join([reply.data async for reply in download]), steps


@asynccontextmanager
async def running(url: str, directory: Path, plugins: Path, checkpoint: Path) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        common = ("--model", f"toy={checkpoint}", "--plugins", str(plugins), "--redis", url, *_HANGS)
        own = ("--listen", f"unix:{directory}/d.sock", "--device", "cpu", "--threads", "1", "--step-seconds", "0")
        denoiser = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.denoising", *common, *own, stderr=PIPE
        )
        stack.push_async_callback(_end, denoiser)
        model = open_model(f"toy={checkpoint}", load_registry([plugins]))
        settings = CoordinatorSettings(
            listen=f"unix:{directory}/c.sock", redis=url, step_seconds=0.0, heartbeat_seconds=0.2
        )
        coordinator = await start_coordinator([model], settings)
        stack.push_async_callback(coordinator.stop, 0)
        channel = await stack.enter_async_context(open_channel(coordinator.address))
        fleet = Fleet(generation_pb2_grpc.GenerationServiceStub(channel), url, model, plugins, denoiser, stack)
        for service in ("text_encoding", "latent_preparation", "decoding"):
            await fleet.start(service, directory)
        yield fleet


async def _end(process: Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


def test_hung_worker_exits_and_its_request_resumes_on_another_worker(tmp_path: Path) -> None:
    checkpoint = build_toy_checkpoint(tmp_path / "checkpoint")
    marker = tmp_path / "stuck"

    async def scenario(url: str, directory: Path, plugins: Path) -> None:
        async with asyncio.timeout(HANG_SECONDS), running(url, directory, plugins, checkpoint) as fleet:
            _, steps = await fleet.result(await fleet.submit(SLOW_SEED))
            # A step that is reported before the previous step is stored replaces it.
            assert steps == sorted(set(steps)), "a slow loop was treated as hung"
            assert (steps[0], steps[-1]) == (0, STEPS)
            name = await fleet.submit(STUCK_SEED)
            log, code = await _read_to_end(fleet.denoiser)
            assert marker.exists()
            assert code == TEMPORARY_FAILURE
            line = next(each for each in log.splitlines() if "call cancelled" in each)
            assert f" request_id={name} " in line, "the watchdog's log line has no request id"
            assert 'reason="the stage has reported no step for' in line
            assert f"the call has not ended 0.5 s after request {name} was cancelled" in log
            assert "toy_stages.py" in log or "threading.py" in log, "the log has no stack of the device thread"
            async with connect(url) as redis:
                assert not await command(redis, "KEYS", "fleet:leaving:*")
            await fleet.start("denoising", directory)
            resumed, steps = await fleet.result(name)
            assert min(steps[steps.index(0, 1) + 1 :]) > 2, "the request did not resume from the newest step checkpoint"
            uninterrupted, _ = await fleet.result(await fleet.submit(STUCK_SEED))
            assert resumed == uninterrupted

    with (
        running_server("valkey") as server,
        tempfile.TemporaryDirectory(prefix="hung-") as directory,
        toy_family(tmp_path / "plugins") as plugins,
    ):
        stages = plugins / "toy_stages.py"
        stages.write_text(stages.read_text() + _STUCK_STAGE.replace("MARKER", str(marker)))
        asyncio.run(scenario(server.url, Path(directory), plugins))


async def _read_to_end(process: Process) -> tuple[str, int]:
    assert process.stderr is not None
    return (await process.stderr.read()).decode(), await process.wait()
