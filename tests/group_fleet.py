"""A fleet with a denoising worker group of processes, for fault tests. Other services run in this process."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
from redis.asyncio import Redis

from async_tests import HANG_SECONDS, wait_until
from common.rpc.client import open_channel
from common.state.connection import connect
from common.state.workers import WorkerRegistry
from coordinator_fleet import Stub, emoji
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import generation_pb2_grpc, worker_pb2
from late_faults import FaultTooLate, repeat_if_late
from redis_servers import running_server
from services.cli.serve import settings_class
from services.coordinator.coordinator import start_coordinator
from services.coordinator.settings import CoordinatorSettings
from services.worker import start_worker

T = TypeVar("T")

STEPS = 8
SIZE = 512  # pixels; large enough that a step lasts longer than its progress message takes to arrive

_SERVE = ("--model", "emoji", "--threads", "1", "--step-checkpoint-every", "1", "--step-seconds", "0")
_LIVENESS_FLAGS = ("--rank-heartbeat-seconds", "0.1", "--rank-lost-seconds", "2")

OnStep = Callable[[], None]


@dataclass(frozen=True)
class Workload:
    """Device and request size of a test.

    Steps must be long enough to inject a fault during a step. `liveness_flags` set the heartbeats between ranks.
    """

    device: str = "cpu"
    steps: int = STEPS
    size: int = SIZE
    liveness_flags: tuple[str, ...] = _LIVENESS_FLAGS


@dataclass
class Generated:
    """Outcome of a request: its state, its file, the steps that the denoiser reported, and its duration in seconds."""

    state: pb.RequestState.ValueType = pb.REQUEST_STATE_UNSPECIFIED
    file: bytes = b""
    steps: list[int] = field(default_factory=list)
    seconds: float = 0.0


WORKLOAD = Workload()


class GroupFleet:
    """Runs coroutines on the fleet's event loop, from the test's own thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        url: str,
        directory: Path,
        nodes: Sequence[Sequence[str]],
        workload: Workload,
    ) -> None:
        self.url = url
        self.workload = workload
        self._loop = loop
        self._directory = directory
        self._stub: Stub
        self._redis: Redis
        self._stack: AsyncExitStack
        self._nodes = nodes
        self._arguments: tuple[str, ...] = ()
        self.agents: dict[int, Process] = {}

    @property
    def agent(self) -> Process:
        """The agent of the node with rank 0."""
        return self.agents[0]

    def run(self, work: Coroutine[None, None, T]) -> T:
        """Run `work` on the fleet's event loop. Raises TimeoutError after HANG_SECONDS."""

        async def bounded() -> T:
            async with asyncio.timeout(HANG_SECONDS):
                return await work

        return asyncio.run_coroutine_threadsafe(bounded(), self._loop).result()

    @asynccontextmanager
    async def started(self, degrees: Sequence[str]) -> AsyncIterator[None]:
        """Start all services of the emoji model; `degrees` are flags of the worker group."""
        async with AsyncExitStack() as stack:
            self._stack = stack
            device = ("--device", self.workload.device)
            self._arguments = (*_SERVE, *self.workload.liveness_flags, *device, *degrees, "--redis", self.url)
            for node, more in enumerate(self._nodes):
                self.agents[node] = await self._start("group", more)
            for service in ("text_encoding", "latent_preparation", "decoding"):
                listen = f"unix:{self._directory}/{service}.sock"
                settings = settings_class(service)(
                    model="emoji", redis=self.url, listen=listen, device=self.workload.device, threads=1
                )
                worker = await start_worker(service, emoji(), settings)
                stack.push_async_callback(worker.stop, 0)
            listen = f"unix:{self._directory}/c.sock"
            chosen = CoordinatorSettings(listen=listen, redis=self.url, step_seconds=0.0, heartbeat_seconds=0.2)
            coordinator = await start_coordinator([emoji()], chosen)
            stack.push_async_callback(coordinator.stop, 0)
            self._stub = generation_pb2_grpc.GenerationServiceStub(
                await stack.enter_async_context(open_channel(listen))
            )
            self._redis = await stack.enter_async_context(connect(self.url))
            await self._serving(self.agent)
            yield

    async def _start(self, name: str, more: Sequence[str] = ()) -> Process:
        """Start the agent of a group with extra flags. Rank 0 listens on the socket NAME.sock."""
        flags = (*self._arguments, "--listen", f"unix:{self._directory}/{name}.sock", *more)
        agent = await asyncio.create_subprocess_exec(sys.executable, "-m", "services.denoising", *flags)
        self._stack.push_async_callback(_end, agent)
        return agent

    def add_group(self, name: str) -> Process:
        """Start another group with the same flags; returns its agent once the group serves."""
        return self.run(self._add_group(name))

    async def _add_group(self, name: str) -> Process:
        before = len(await WorkerRegistry(self._redis).live("emoji", "denoising"))
        agent = await self._start(name)
        await self._serving(agent, before + 1)
        return agent

    async def _serving(self, agent: Process, count: int = 1) -> None:
        """Wait until `count` denoisers are live. Asserts that `agent` runs."""

        async def announced() -> bool:
            assert agent.returncode is None, "the agent has exited"
            return len(await WorkerRegistry(self._redis).live("emoji", "denoising")) >= count

        await wait_until(announced)

    def workers(self) -> list[worker_pb2.WorkerInfo]:
        """The denoisers that the store lists as live."""
        return self.run(WorkerRegistry(self._redis).live("emoji", "denoising"))

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of the first group, by rank."""
        return self.ranks_of(*self.agents.values())

    def ranks_of(self, *agents: Process) -> dict[int, psutil.Process]:
        """The rank processes of the agents, by rank.

        A child without RANK in its environment is excluded: it has not become a rank yet.
        """
        children = [child for agent in agents for child in psutil.Process(agent.pid).children()]
        alive = [(child, child.environ()) for child in children if child.status() != psutil.STATUS_ZOMBIE]
        return {int(environment["RANK"]): child for child, environment in alive if "RANK" in environment}

    def restarted(self, rank: int, before: psutil.Process) -> psutil.Process:
        """Wait for the process that replaces `before` as this rank."""
        return self.run(self._restarted(rank, before))

    async def _restarted(self, rank: int, before: psutil.Process) -> psutil.Process:
        while True:
            with suppress(psutil.Error):  # A process may end while it is inspected.
                found = self.ranks().get(rank, before)
                if found != before:
                    return found
            await asyncio.sleep(0.01)

    def generate(self, at_step: int = 0, then: OnStep | None = None) -> Generated:
        """Run one request to its end; `then` is called once, at the denoiser's step `at_step`."""
        return self.run(self._generate(at_step, then))

    def lose_rank(self, rank: int, number: signal.Signals) -> Generated:
        """Run one request to its end, and send a signal to a rank at half of its steps.

        The group must not survive the signal. Repeats a request that the signal did not interrupt. Raises FaultTooLate
        after several attempts.
        """
        lost: list[psutil.Process] = []

        async def attempt() -> Generated:
            lost.append(self.ranks()[rank])
            generated = await self._generate(self.workload.steps // 2, partial(lost[-1].send_signal, number))
            if generated.steps.count(0) == 1 and generated.state == pb.REQUEST_STATE_SUCCEEDED:
                raise FaultTooLate("the group finished all steps")
            return generated

        async def wait_for_ranks() -> None:
            await self._restarted(rank, lost[-1])

        return self.run(repeat_if_late(attempt, wait_for_ranks))

    def cancel_at(self, step: int) -> Generated:
        """Run one request that is cancelled at the denoiser's step `step`.

        Repeats a request that succeeded before it was cancelled. Raises FaultTooLate after several attempts.
        """

        async def attempt() -> Generated:
            generated = await self._generate(step, None, cancel=True)
            if generated.state == pb.REQUEST_STATE_SUCCEEDED:
                raise FaultTooLate("the request succeeded before it was cancelled")
            return generated

        return self.run(repeat_if_late(attempt))

    async def _generate(self, at_step: int, then: OnStep | None, *, cancel: bool = False) -> Generated:
        parameters = pb.GenerationParameters(
            prompt="a red apple",
            seed=3,
            num_inference_steps=self.workload.steps,
            height=self.workload.size,
            width=self.workload.size,
        )
        began = time.perf_counter()
        name = (await self._stub.Submit(pb.SubmitRequest(parameters=parameters))).request.request_id
        generated = Generated()
        async for reply in self._stub.Watch(pb.WatchRequest(request_id=name)):
            generated.state = reply.event.state_change.state or generated.state
            if reply.event.progress.service != "denoising":
                continue
            generated.steps.append(reply.event.progress.step)
            if at_step and generated.steps[-1] >= at_step:
                at_step = 0
                if cancel:
                    await self._stub.CancelRequest(pb.CancelRequestRequest(request_id=name))
                elif then is not None:
                    then()
        if generated.state == pb.REQUEST_STATE_SUCCEEDED:
            download = self._stub.DownloadResult(pb.DownloadResultRequest(request_id=name))
            generated.file = b"".join([reply.data async for reply in download])
        generated.seconds = time.perf_counter() - began
        return generated


async def _end(process: Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


@contextmanager
def group_fleet(
    directory: Path, *degrees: str, nodes: Sequence[Sequence[str]] = ((),), workload: Workload = WORKLOAD
) -> Iterator[GroupFleet]:
    """A running fleet with one worker group. `degrees` are its flags; each node has an agent, with extra flags."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="fleet")
    thread.start()
    try:
        with running_server("valkey") as server:
            fleet = GroupFleet(loop, server.url, directory, nodes, workload)
            context: Any = fleet.started(degrees)
            fleet.run(context.__aenter__())
            try:
                yield fleet
            finally:
                fleet.run(context.__aexit__(None, None, None))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
