"""A cancelled, abandoned or expired request frees its worker within a step and deletes its store keys."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Callable

import pytest
from prometheus_client import REGISTRY

from async_tests import wait_until
from common.stage import Call
from common.state.connection import connect
from coordinator_fleet import FakeFleet, Gate, Stub, run_on_fleet, submission, submit_expiring, terminal
from fleet.v1 import generation_pb2 as pb
from late_faults import FaultTooLate, longer_each_time

STEPS = 8
COMPLETED_STEPS = 3
INPUT_BYTES = 2 << 20
"""Buffer bytes of the denoiser's call: embeddings of 1.2 MB, rounded up to MiB; other tensors are inline."""

Stopping = Callable[[Stub, pb.SubmitRequest, float], AsyncIterator[str]]
"""Submits a request and yields its id; then stops the request. The number is the time to a deadline in seconds."""


class Steps:
    """A loop that waits after COMPLETED_STEPS steps until the gate is open or the call is cancelled."""

    def __init__(self) -> None:
        self.gate = Gate()

    def __call__(self, call: Call) -> None:
        for step in range(1, STEPS + 1):
            call.progress(step, STEPS)
            if step == COMPLETED_STEPS:
                self.gate(call)


async def by_call(stub: Stub, request: pb.SubmitRequest, _: float) -> AsyncIterator[str]:
    """Call CancelRequest."""
    name = (await stub.Submit(request)).request.request_id
    yield name
    await stub.CancelRequest(pb.CancelRequestRequest(request_id=name))


async def by_disconnecting(stub: Stub, request: pb.SubmitRequest, _: float) -> AsyncIterator[str]:
    """Disconnect the caller of Generate."""
    call = stub.Generate(pb.GenerateRequest(request=request))
    yield (await anext(aiter(call))).accepted.request_id
    call.cancel()


async def by_deadline(stub: Stub, request: pb.SubmitRequest, seconds: float) -> AsyncIterator[str]:
    """Submit with a deadline that expires after the steps were reported."""
    yield await submit_expiring(stub, request, seconds)


async def left_in(url: str) -> list[bytes | str]:
    """Store keys of queues, worker slots, work, open requests, step checkpoints and cancellations."""
    async with connect(url) as redis:
        names = ("queue", "waiting", "slots", "work", "open", "checkpoint", "cancels")
        return [key for name in names for key in await redis.keys(f"fleet:{name}:*")]


def steps_saved() -> float:
    return REGISTRY.get_sample_value("fleet_steps_saved_total", {"model": "emoji"}) or 0.0


@pytest.mark.parametrize(
    ("stopping", "end"),
    [
        (by_call, pb.REQUEST_STATE_CANCELLED),
        (by_disconnecting, pb.REQUEST_STATE_CANCELLED),
        (by_deadline, pb.REQUEST_STATE_EXPIRED),
    ],
)
def test_stopped_request_frees_its_worker_and_the_store(
    store_url: str, stopping: Stopping, end: pb.RequestState.ValueType
) -> None:
    seconds = longer_each_time(3.0)

    async def scenario(fleet: FakeFleet) -> None:
        steps = Steps()
        fleet.scripts["denoising"].work = steps
        await fleet.add_workers(["text_encoding", "latent_preparation", "decoding"])
        worker = await fleet.add_worker("denoising")
        coordinator, stub = await fleet.add_coordinator(step_seconds=0.0)
        request = submission()
        request.parameters.num_inference_steps = STEPS
        before = steps_saved()
        stopped = stopping(stub, request, next(seconds))
        name = await anext(stopped)
        async for reply in stub.Watch(pb.WatchRequest(request_id=name)):
            if reply.event.progress.step == COMPLETED_STEPS:
                break
            if reply.event.state_change.state == pb.REQUEST_STATE_EXPIRED:
                raise FaultTooLate(f"the request expired before step {COMPLETED_STEPS} was reported")
        assert not [_ async for _ in stopped]
        change = (await terminal(stub, name))[-1].state_change
        assert (change.state, change.steps_saved) == (end, STEPS - COMPLETED_STEPS)

        async def is_counted() -> bool:
            return steps_saved() - before == STEPS - COMPLETED_STEPS

        await wait_until(is_counted)  # the coordinator counts after the store has published the terminal state
        record = (await stub.GetRequest(pb.GetRequestRequest(request_id=name))).request
        assert record.steps_saved == STEPS - COMPLETED_STEPS

        async def nothing_is_left() -> bool:
            gc.collect()
            buffers = worker.servicer.pool.idle_bytes == INPUT_BYTES
            return buffers and not coordinator.artifact_memory.used_bytes and not await left_in(store_url)

        await wait_until(nothing_is_left)
        assert worker.servicer.in_flight == 0
        steps.gate.opened.set()
        again = (await stub.Submit(submission())).request.request_id
        change = (await terminal(stub, again))[-1].state_change
        assert (change.state, change.steps_saved) == (pb.REQUEST_STATE_SUCCEEDED, 0)
        assert fleet.scripts["denoising"].calls == [name, again]
        await wait_until(nothing_is_left)

    run_on_fleet(store_url, scenario)


def test_cancelled_waiting_request_saves_all_its_steps(store_url: str) -> None:
    async def scenario(fleet: FakeFleet) -> None:
        gate = Gate()
        fleet.scripts["text_encoding"].work = gate
        await fleet.add_workers()
        _, stub = await fleet.add_coordinator()
        running = (await stub.Submit(submission())).request.request_id
        await gate.wait_reached()
        request = submission()
        request.parameters.num_inference_steps = STEPS
        waiting = (await stub.Submit(request)).request.request_id
        await stub.CancelRequest(pb.CancelRequestRequest(request_id=waiting))
        assert (await terminal(stub, waiting))[-1].state_change.steps_saved == STEPS
        gate.opened.set()
        assert (await terminal(stub, running))[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED

        async def nothing_is_left() -> bool:
            return not await left_in(store_url)

        await wait_until(nothing_is_left)

    run_on_fleet(store_url, scenario)
