"""A fleet of real processes, for tests that signal a process while a request runs."""

from __future__ import annotations

import random
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from chaos_processes import Fleet, Process
from redis.asyncio import Redis

from async_tests import wait_until
from common.rpc.client import open_channel
from common.state.connection import command, connect
from coordinator_fleet import Stub, submit_expiring
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import generation_pb2_grpc
from late_faults import FaultTooLate, repeat_if_late
from models.catalog import open_model
from models.registry import load_registry

STEPS = 8
T = TypeVar("T")
CHECKPOINTS = Path(__file__).resolve().parents[1] / "models" / "checkpoints"


@dataclass(frozen=True)
class Family:
    """A model, and a request whose steps last longer than the delivery of a progress message.

    `model` is a shipped model, or the name of the checkpoint that `build` writes. The result file starts with
    `begins_with`. `workers` is the number of workers per service; denoising always has two. Faults hit workers of
    `service`.
    """

    model: str
    given: dict[str, Any]
    begins_with: bytes
    build: Callable[[Path], Path] | None = None
    images: Sequence[pb.ImageInput] = ()
    coordinators: int = 2
    workers: int = 2
    service: str = "denoising"


class Served:
    """A running fleet of one model, with a stub for each coordinator."""

    def __init__(self, fleet: Fleet, redis: Redis, family: Family, stack: AsyncExitStack) -> None:
        self.fleet = fleet
        self.redis = redis
        self.stubs: Sequence[Stub] = ()
        self.stored_step = 0
        self._family = family
        self._stack = stack

    async def connect(self) -> None:
        """Replace the stubs by stubs of the running coordinators; waits until each lists all workers."""
        await wait_until(self.fleet.is_complete)
        stubs = []
        for coordinator in self.fleet.of(coordinators=True):
            channel = await self._stack.enter_async_context(open_channel(coordinator.target))
            stubs.append(generation_pb2_grpc.GenerationServiceStub(channel))
            await wait_until(partial(is_complete, stubs[-1], self.fleet.workers))
        self.stubs = stubs

    async def repeat_if_late(self, case: Callable[[], Awaitable[T]]) -> T:
        """Run a case, and repeat it with the replaced processes while its fault comes too late."""
        return await repeat_if_late(case, self.connect)

    async def submit(self, stub: Stub, seconds: float | None = None) -> str:
        """Submit the family's request with a deadline of `seconds`; returns the request id.

        Raises FaultTooLate if the request was not admitted before its deadline.
        """
        parameters = pb.GenerationParameters(
            prompt="a red heart moving left",
            seed=3,
            images=self._family.images,
            **{"num_inference_steps": STEPS, **self._family.given},
        )
        request = pb.SubmitRequest(parameters=parameters)
        if seconds is not None:
            return await submit_expiring(stub, request, seconds)
        return (await stub.Submit(request)).request.request_id

    async def result(
        self, stub: Stub, name: str, kill_at: int = 0, kill: Callable[[str], Awaitable[None]] | None = None
    ) -> tuple[bytes, list[int]]:
        """Wait for the end; returns the file and the reported steps. `kill` is called once, at step `kill_at`.

        Raises FaultTooLate if the request succeeded without a second worker, although `kill` is given.
        """
        steps: list[int] = []
        needs_second_worker = kill is not None
        last = pb.StateChange()
        async for reply in stub.Watch(pb.WatchRequest(request_id=name)):
            last = reply.event.state_change
            if reply.event.progress.service == self._family.service:
                steps.append(reply.event.progress.step)
                if kill is not None and steps[-1] >= kill_at:
                    await kill(name)
                    kill = None
        assert last.state == pb.REQUEST_STATE_SUCCEEDED, last
        if needs_second_worker and steps.count(0) == 1:
            raise FaultTooLate(f"one worker of {self._family.service} finished all steps")
        download = stub.DownloadResult(pb.DownloadResultRequest(request_id=name))
        return b"".join([reply.data async for reply in download]), steps

    async def kill_worker(self, _: str) -> None:
        """Send SIGKILL to the worker that runs the request."""
        await self.signal_worker(self._family.service, signal.SIGKILL)

    async def end_worker(self, _: str) -> None:
        """Send SIGTERM to the worker that runs the request."""
        await self.signal_worker(self._family.service, signal.SIGTERM)

    async def signal_worker(self, service: str, number: signal.Signals) -> Process:
        """Send a signal to the worker of a service that runs the request; returns the worker's process.

        Raises FaultTooLate if the service has finished its part of the request.
        """
        (slot,) = await self._slots(service)
        # The worker id ends with -PID-RANDOM.
        pid = int(slot.decode().partition("|")[0].split("-")[-2])
        (worker,) = [each for each in self.fleet.of(coordinators=False) if each.pid == pid]
        self.fleet.signal(worker, number)
        return worker

    async def _slots(self, service: str) -> Sequence[bytes]:
        """Taken worker slots of a service. Raises FaultTooLate if there are none."""
        slots: Sequence[bytes] = await command(self.redis, "HVALS", f"fleet:slots:{self._family.model}/{service}")
        if not slots:
            raise FaultTooLate(f"no worker of {service} runs the request")
        return slots

    async def kill_both(self, name: str) -> None:
        """Wait for a stored step checkpoint, then send SIGKILL to the second coordinator and to the worker.

        Raises FaultTooLate if the service has finished its part of the request.
        """

        async def is_stored() -> bool:
            await self._slots(self._family.service)
            step_checkpoint_key: bytes = await command(self.redis, "HGET", f"fleet:request:{name}", "point") or b"-0"
            self.stored_step = int(step_checkpoint_key.rpartition(b"-")[2])
            return self.stored_step > 0

        await wait_until(is_stored)
        self.fleet.signal(self.fleet.of(coordinators=True)[1], signal.SIGKILL)
        await self.kill_worker(name)


@asynccontextmanager
async def served(family: Family) -> AsyncIterator[Served]:
    """Start the family's coordinators and workers, and wait until every coordinator lists all workers."""
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="resume-")))
        path = CHECKPOINTS / family.model if family.build is None else family.build(directory / family.model)
        fleet = Fleet(
            directory,
            {family.model: path},
            random.Random(0),
            coordinators=family.coordinators,
            workers=family.workers,
            denoisers=2,
            services=[spec.service for spec in open_model(str(path), load_registry()).services],
        )
        stack.push_async_callback(fleet.close)
        await fleet.start()
        redis = await stack.enter_async_context(connect(fleet.server.url))
        served = Served(fleet, redis, family, stack)
        await served.connect()
        yield served
        await fleet.stop()
        assert not fleet.findings


async def is_complete(stub: Stub, workers: Mapping[str, int]) -> bool:
    """Whether a coordinator lists the expected number of workers of each service."""
    (model,) = (await stub.ListModels(pb.ListModelsRequest(), wait_for_ready=True)).models
    return {each.service: each.workers for each in model.services} == workers


def resumed_at(steps: list[int]) -> int:
    """The first completed step that the second worker reported."""
    assert steps.count(0) == 2, steps
    return steps[steps.index(0, 1) + 1]
