"""A coordinator and workers with scripted stages in this process, with real gRPC and a real store."""

from __future__ import annotations

import asyncio
import secrets
import sys
import tempfile
import threading
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import torch

from async_tests import HANG_SECONDS
from common.artifacts import Conditioning, Generator, LatentPart, Latents, Media, MediaItem, Schedule
from common.errors import Unavailable
from common.rpc.client import open_channel
from common.rpc.fleet_server import FleetServer
from common.rpc.stage_servicer import ServicerLimits, StageServicer
from common.stage import Call, Contract
from common.state.connection import command, connect
from common.state.presence import TTL_SECONDS
from common.state.requests import RequestStore
from common.state.workers import WorkerRegistry
from common.tensors import TORCH
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import generation_pb2_grpc, worker_pb2
from late_faults import FaultTooLate, repeat_if_late
from models.catalog import ServedModel, open_model
from models.registry import load_registry
from services.coordinator.coordinator import Coordinator, start_coordinator
from services.coordinator.settings import CoordinatorSettings
from services.leaving import leave

Stub: TypeAlias = "generation_pb2_grpc.GenerationServiceAsyncStub"

SERVICES = ("text_encoding", "latent_preparation", "denoising", "decoding")


def _ignore(_: Call) -> None:
    return None


def latents_of(value: torch.Tensor) -> Latents:
    """Latents of one part, of shape (1, 4)."""
    return Latents(parts={"image": LatentPart(latents=value, raw_latent_shape=(1, 4))})


def _latents() -> Latents:
    return latents_of(torch.zeros(1, 4))


def _outputs(values: Mapping[str, Any], size: int) -> dict[str, Any]:
    """A value for every slot that Flux's services write; the image has `size` equal bytes."""
    canvas = values.get("canvas")
    made: dict[str, Any] = {
        "text_conditioning": Conditioning(prompt_embeds={"x": torch.zeros(300_000)}),
        "initial_latents": _latents(),
        "schedule": Schedule(timesteps=torch.zeros(2), sigmas=torch.zeros(3), num_inference_steps=2),
        "denoised_latents": _latents(),
        "denoising_generator": Generator(seed=1, state=torch.zeros(200_000, dtype=torch.uint8)),
    }
    if canvas is not None:
        data = torch.full((size,), 7, dtype=torch.uint8)
        item = MediaItem(data=data, content_type="image/png", height=canvas.height, width=canvas.width)
        made["media"] = Media(items=(item,))
    return made


@dataclass
class Script:
    """A fake stage: runs `work` with its Call on the device thread, then returns its outputs."""

    contract: Contract
    work: Callable[[Call], None] = _ignore
    result_bytes: int = 100
    calls: list[str] = field(default_factory=list)
    received: list[frozenset[str]] = field(default_factory=list)
    """The slots of each call."""

    def contract_of(self, variant: str) -> Contract:
        assert not variant, "the model has one variant"
        return self.contract

    def run(self, values: Mapping[str, Any], call: Call) -> dict[str, Any]:
        self.calls.append(call.request_id)
        self.received.append(frozenset(values))
        self.work(call)
        made = _outputs(values, self.result_bytes)
        return {slot: made[slot] for slot in self.contract.outputs}


class Gate:
    """Blocks stages until the test opens it. A cancelled call raises Cancelled, as in real stages."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, call: Call) -> None:
        self.reached.set()
        while not self.opened.wait(0.005):
            call.check_cancelled()
        call.check_cancelled()

    async def wait_reached(self) -> None:
        """Wait until a stage is blocked here."""
        assert await asyncio.to_thread(self.reached.wait, HANG_SECONDS)


@dataclass
class FakeWorker:
    """A worker of one service."""

    info: worker_pb2.WorkerInfo
    server: FleetServer
    registry: WorkerRegistry
    servicer: StageServicer
    is_dead: bool = False
    is_silent: asyncio.Event = field(default_factory=asyncio.Event)

    def is_able(self) -> bool:
        """Whether to send a heartbeat. The call after the death sets `is_silent`: no heartbeat is in flight."""
        if self.is_dead:
            self.is_silent.set()
        return not self.is_dead

    async def withdraw(self) -> None:
        await self.registry.withdraw(self.info.worker_id)

    async def leave(self, grace: float) -> None:
        """Drain and stop, as on SIGTERM."""
        await leave(self.info, self.registry, self.server, self.servicer, grace)

    async def hang_up(self) -> None:
        """Drop all calls and refuse new calls, as in a network failure; heartbeats continue."""
        await self.server.grpc_server.stop(None)

    async def die(self, ttl_seconds: float | None = None) -> None:
        """Stop sending heartbeats and serving, without withdrawing from the store.

        With `ttl_seconds`, the last heartbeat has this TTL, so that a long TTL during the life delays no test.
        """
        self.is_dead = True
        # A heartbeat that reaches the store after the loss would clear the loss.
        await self.is_silent.wait()
        if ttl_seconds is not None:
            self.registry._ttl = int(ttl_seconds * 1_000)
            await self.registry.announce(self.info, is_able=self.is_able)
        await self.hang_up()


class FakeFleet:
    """The store's URL, workers and coordinators; running_fleet() stops them when its context exits."""

    def __init__(self, url: str, model: ServedModel, directory: Path, stack: AsyncExitStack) -> None:
        self.url = url
        self.model = model
        self.directory = directory
        self.scripts = {spec.service: Script(spec.contract) for spec in model.services}
        self._stack = stack

    async def add_worker(
        self,
        service: str,
        script: Script | None = None,
        *,
        capacity: int = 1,
        announced: int = 0,
        ttl_seconds: float = TTL_SECONDS,
        reports_begun: bool = True,
        numerics: str = "",
    ) -> FakeWorker:
        """Start and announce another worker, by default with the service's shared script.

        `announced` is the announced capacity, if it differs from `capacity`. A heartbeat expires after `ttl_seconds`.
        Without `reports_begun`, the worker behaves as a worker of an older release. `numerics` is its numerics
        fingerprint; an empty fingerprint equals that of no other worker.
        """
        script = script or self.scripts[service]
        executor = ThreadPoolExecutor(1)
        self._stack.callback(executor.shutdown, wait=True, cancel_futures=True)
        limits = ServicerLimits(capacity=capacity)
        servicer = StageServicer(service, script, executor, TORCH, limits=limits, model=self.model.name)
        server = FleetServer(f"unix:{self.directory}/{secrets.token_hex(4)}.sock")
        server.add(servicer.methods, servicer.service_name)
        await server.start()
        self._stack.push_async_callback(server.drain, 0)
        redis = connect(self.url)
        self._stack.push_async_callback(redis.aclose)
        registry = WorkerRegistry(redis, heartbeat_seconds=0.1, ttl_seconds=ttl_seconds)
        contract = script.contract
        info = worker_pb2.WorkerInfo(
            worker_id=f"{service}-{secrets.token_hex(4)}",
            service=service,
            model=self.model.name,
            model_fingerprint=self.model.checkpoint.fingerprint,
            numerics_fingerprint=numerics,
            address=server.address,
            capacity=announced or capacity,
            reports_begun=reports_begun,
            contract=worker_pb2.StageContract(
                inputs=contract.inputs, outputs=contract.outputs, optional_inputs=sorted(contract.optional)
            ),
        )
        worker = FakeWorker(info, server, registry, servicer)
        await registry.announce(info, is_able=worker.is_able)
        self._stack.push_async_callback(_withdraw, worker)
        return worker

    async def add_workers(self, services: Sequence[str] = SERVICES) -> None:
        """Add one worker of each service."""
        for service in services:
            await self.add_worker(service)

    async def add_coordinator(self, **settings: Any) -> tuple[Coordinator, Stub]:
        """Start a coordinator; returns it with a stub."""
        listen = f"unix:{self.directory}/{secrets.token_hex(4)}.sock"
        chosen = CoordinatorSettings(**{"listen": listen, "redis": self.url, "heartbeat_seconds": 0.2, **settings})
        coordinator = await start_coordinator([self.model], chosen)
        self._stack.push_async_callback(coordinator.stop, 0)
        channel = open_channel(coordinator.address)
        self._stack.push_async_callback(channel.close)
        return coordinator, generation_pb2_grpc.GenerationServiceStub(channel)

    async def start_process(self, listen: str, *more: str, ttl_seconds: float = 0.5) -> Process:
        """Start a coordinator in a separate process, which is killed with the fleet if it still runs."""
        heartbeat = ("--heartbeat-seconds", "0.1", "--heartbeat-ttl-seconds", str(ttl_seconds))
        flags = ("--listen", listen, "--redis", self.url, *heartbeat, "--log-level", "ERROR", *more)
        command = (sys.executable, "-m", "services.coordinator", *flags)
        process = await asyncio.create_subprocess_exec(*command, stdout=DEVNULL, stderr=PIPE)
        self._stack.push_async_callback(_kill, process)
        assert process.stderr is not None
        while b"listens" not in (line := await process.stderr.readline()):
            assert line, "the coordinator exited during its start"
        return process


async def _kill(process: Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


async def _withdraw(worker: FakeWorker) -> None:
    try:
        await worker.withdraw()
    except Unavailable:
        return  # The test has stopped the store.


@asynccontextmanager
async def running_fleet(url: str, model: ServedModel) -> AsyncIterator[FakeFleet]:
    """A fleet with an empty store, and no workers or coordinators yet."""
    async with connect(url) as redis:
        await redis.flushall()
    with tempfile.TemporaryDirectory(prefix="fleet-") as directory:
        async with AsyncExitStack() as stack:
            yield FakeFleet(url, model, Path(directory), stack)


def run_on_fleet(url: str, test: Callable[[FakeFleet], Awaitable[None]]) -> None:
    """Run a test on a new fleet of the shipped model "emoji". Repeats a test that raises FaultTooLate."""

    async def main() -> None:
        async with asyncio.timeout(HANG_SECONDS), running_fleet(url, emoji()) as fleet:
            await test(fleet)

    asyncio.run(repeat_if_late(main))


def emoji() -> ServedModel:
    """The shipped model "emoji", opened without loading weights."""
    return open_model("emoji", load_registry())


def submission(prompt: str = "a red apple", **fields: Any) -> pb.SubmitRequest:
    """A request of the emoji model."""
    return pb.SubmitRequest(parameters=pb.GenerationParameters(prompt=prompt), **fields)


async def submit_expiring(stub: Stub, request: pb.SubmitRequest, seconds: float) -> str:
    """Submit a request whose deadline is `seconds` from now; returns its id.

    Raises FaultTooLate if the request was not admitted before its deadline.
    """
    request.deadline.FromMilliseconds(round((time.time() + seconds) * 1_000))
    try:
        return (await stub.Submit(request)).request.request_id
    except grpc.aio.AioRpcError as error:
        if error_of(error) == ("INVALID_ARGUMENT", "deadline"):
            raise FaultTooLate("the request was not admitted before its deadline") from error
        raise


async def terminal(stub: Stub, request_id: str) -> list[pb.Event]:
    """All events of a request, once it has ended."""
    return [response.event async for response in stub.Watch(pb.WatchRequest(request_id=request_id))]


async def admit_late(fleet: FakeFleet, stub: Stub) -> None:
    """Store the request "late" as owned by the coordinator of `stub`, which does not know the request."""
    known = (await stub.Submit(submission())).request
    await terminal(stub, known.request_id)
    async with connect(fleet.url) as redis:
        owner = await command(redis, "HGET", f"fleet:request:{known.request_id}", "owner")
        late = pb.RequestRecord(request_id="late", model=known.model, parameters=known.parameters)
        stored = pb.SubmitRequest(model=known.model, parameters=known.parameters).SerializeToString()
        await RequestStore(redis, owner=owner.decode()).admit(late, submission=stored)


def error_of(error: grpc.aio.AioRpcError) -> tuple[str, str]:
    """The code of a call's error, and the field that the error names."""
    metadata = dict(error.trailing_metadata() or ())
    return error.code().name, str(metadata.get("fleet-error-field", ""))
