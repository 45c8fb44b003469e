"""A poison request on real processes: its denoisers are killed after a step checkpoint at step 4."""

from __future__ import annotations

import asyncio
import random
import signal
import tempfile
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path

from chaos_processes import Fleet, Process
from redis.asyncio import Redis

from async_tests import run_bounded, wait_until
from common.rpc.client import open_channel
from common.state.connection import command, connect
from coordinator_fleet import Stub
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import generation_pb2_grpc
from late_faults import FaultTooLate, repeat_if_late

STEPS = 8
CHECKPOINT_STEP = 4
CHECKPOINTS = Path(__file__).resolve().parents[2] / "models" / "checkpoints"


class FleetWithRareCheckpoints(Fleet):
    """A fleet whose denoisers send a step checkpoint after step 4 only."""

    def _arguments(self, process: Process) -> list[str]:
        flags = ["--step-checkpoint-every", str(CHECKPOINT_STEP), "--step-checkpoint-seconds", "0"]
        return super()._arguments(process) + (flags if process.role.program == "denoising" else [])


class WorkerKiller:
    """Kills the denoiser of a request whenever it reports a step after the step checkpoint."""

    def __init__(self, fleet: Fleet, redis: Redis, stub: Stub) -> None:
        self.killed: set[int] = set()
        self._fleet = fleet
        self._redis = redis
        self._stub = stub

    async def watch(self, request_id: str) -> pb.StateChange:
        """Follow the request to its end, and kill its denoisers; returns its last state change."""
        last = pb.StateChange()
        async for reply in self._stub.Watch(pb.WatchRequest(request_id=request_id)):
            last = reply.event.state_change
            progress = reply.event.progress
            if progress.service == "denoising" and progress.step > CHECKPOINT_STEP:
                await self._kill(request_id)
        return last

    async def _kill(self, request_id: str) -> None:
        """Wait for the stored step checkpoint, then send SIGKILL to the request's worker, if the worker still runs it.

        A worker's id contains its PID.
        """

        async def is_stored_or_late() -> bool:
            reached = await command(self._redis, "HGET", f"fleet:request:{request_id}", "reached")
            return bool(reached == str(CHECKPOINT_STEP).encode()) or not await self._worker_slots(request_id)

        await wait_until(is_stored_or_late)
        for worker_slot in await self._worker_slots(request_id):
            pid = int(worker_slot.decode().partition("|")[0].split("-")[-2])
            if pid not in self.killed:
                self.killed.add(pid)
                (worker,) = [each for each in self._fleet.of(coordinators=False) if each.pid == pid]
                self._fleet.signal(worker, signal.SIGKILL)

    async def _worker_slots(self, request_id: str) -> list[bytes]:
        """The denoisers' worker slots that the request has taken."""
        slots: dict[bytes, bytes] = await command(self._redis, "HGETALL", "fleet:slots:emoji/denoising")
        return [slot for ticket, slot in slots.items() if ticket.decode().startswith(f"{request_id}/")]


async def submit(stub: Stub, steps: int) -> str:
    parameters = pb.GenerationParameters(prompt="a red heart", seed=3, height=384, width=384, num_inference_steps=steps)
    return (await stub.Submit(pb.SubmitRequest(parameters=parameters))).request.request_id


async def steps_and_state(stub: Stub, request_id: str) -> tuple[list[int], pb.RequestState.ValueType]:
    """Reported denoising steps, and the terminal state."""
    events = [reply.event async for reply in stub.Watch(pb.WatchRequest(request_id=request_id))]
    steps = [event.progress.step for event in events if event.progress.service == "denoising"]
    return [step for step in steps if step > 0], events[-1].state_change.state


def test_poison_request_fails_after_three_lost_workers_and_others_succeed() -> None:
    async def scenario() -> None:
        """Each attempt has its own fleet: the lost workers of an earlier attempt would count as churn."""
        async with AsyncExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="poison-")))
            models = {"emoji": CHECKPOINTS / "emoji"}
            fleet = FleetWithRareCheckpoints(directory, models, random.Random(0), coordinators=1, workers=2)
            stack.push_async_callback(fleet.close)
            await fleet.start()
            redis = await stack.enter_async_context(connect(fleet.server.url))
            (coordinator,) = fleet.of(coordinators=True)
            channel = await stack.enter_async_context(open_channel(coordinator.target))
            stub: Stub = generation_pb2_grpc.GenerationServiceStub(channel)

            async def is_complete() -> bool:
                (model,) = (await stub.ListModels(pb.ListModelsRequest(), wait_for_ready=True)).models
                return all(service.workers == 2 for service in model.services)

            await wait_until(is_complete)
            killer = WorkerKiller(fleet, redis, stub)
            request_id = await submit(stub, STEPS)
            watching = asyncio.create_task(killer.watch(request_id))
            innocent = [await submit(stub, 2) for _ in range(3)]
            outcomes = await asyncio.gather(*(steps_and_state(stub, each) for each in innocent))
            for steps, state in outcomes:
                assert state == pb.REQUEST_STATE_SUCCEEDED
                # A later step replaces a step that is not stored yet.
                assert steps in ([1, 2], [2])
            change = await watching
            if change.state == pb.REQUEST_STATE_SUCCEEDED:
                raise FaultTooLate(f"the loop had ended; {len(killer.killed)} workers were killed")
            assert change.state == pb.REQUEST_STATE_FAILED
            assert change.error.message.startswith("3 workers were lost while they ran this request, without progress")
            assert len(killer.killed) == 3
            await fleet.stop()
            assert not fleet.findings

    run_bounded(partial(repeat_if_late, scenario))
