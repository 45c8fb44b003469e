"""The autoscaling loop against a fake external scaler in the same process."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import grpc
import pytest

from async_tests import HANG_SECONDS
from common.errors import NotFound
from externalscaler import externalscaler_pb2 as pb
from externalscaler import externalscaler_pb2_grpc
from services.cli.autoscale import ScalerClient, StageAutoscaler, StageTarget
from services.cli.replica_policy import ReplicaBounds, ReplicaPolicy

TARGET = StageTarget("emoji", "denoising", 2.5)
Context = grpc.aio.ServicerContext[object, object]


class FakeScaler(externalscaler_pb2_grpc.ExternalScalerServicer):
    """Answers with `active` and `seconds`, or refuses every call with `refusal`.

    `is_active_when_polled`, unless None, replaces `active` in the replies of IsActive.
    """

    def __init__(self) -> None:
        self.active = False
        self.is_active_when_polled: bool | None = None
        self.seconds = 0.0
        self.refusal: grpc.StatusCode | None = None
        self.received: list[pb.ScaledObjectRef] = []
        self._changed = asyncio.Event()

    def push(self, active: bool) -> None:
        self.active = active
        self._changed.set()
        self._changed = asyncio.Event()

    async def _record_or_refuse(self, target: pb.ScaledObjectRef, context: Context) -> None:
        self.received.append(target)
        if self.refusal is not None:
            await context.abort(self.refusal, "no stage of that name")

    async def IsActive(self, request: pb.ScaledObjectRef, context: Context) -> pb.IsActiveResponse:  # noqa: N802
        await self._record_or_refuse(request, context)
        polled = self.is_active_when_polled
        return pb.IsActiveResponse(result=self.active if polled is None else polled)

    async def StreamIsActive(  # noqa: N802
        self, request: pb.ScaledObjectRef, context: Context
    ) -> AsyncIterator[pb.IsActiveResponse]:
        await self._record_or_refuse(request, context)
        while True:
            yield pb.IsActiveResponse(result=self.active)
            await self._changed.wait()

    async def GetMetricSpec(  # noqa: N802
        self, request: pb.ScaledObjectRef, context: Context
    ) -> pb.GetMetricSpecResponse:
        await self._record_or_refuse(request, context)
        target = float(request.scalerMetadata["targetSeconds"])
        return pb.GetMetricSpecResponse(metricSpecs=[pb.MetricSpec(metricName="wanted", targetSizeFloat=target)])

    async def StreamMetricSpec(  # noqa: N802
        self, request: pb.ScaledObjectRef, context: Context
    ) -> AsyncIterator[pb.GetMetricSpecResponse]:
        yield await self.GetMetricSpec(request, context)

    async def GetMetrics(self, request: pb.GetMetricsRequest, context: Context) -> pb.GetMetricsResponse:  # noqa: N802
        await self._record_or_refuse(request.scaledObjectRef, context)
        assert request.metricName == "wanted"
        value = pb.MetricValue(metricName="wanted", metricValueFloat=self.seconds)
        return pb.GetMetricsResponse(metricValues=[value])


@dataclass
class FakePool:
    """A pool that counts replicas and starts no process."""

    size: int = 0
    most: int = 64
    sizes: list[int] = field(default_factory=list)

    def resize(self, count: int) -> None:
        self.size = count
        self.sizes.append(count)


@dataclass
class Harness:
    """The fake scaler, the fake pool, the collected notes, and the gRPC channel and server of a test."""

    scaler: FakeScaler
    pool: FakePool
    notes: list[str]
    channel: grpc.aio.Channel
    server: grpc.aio.Server

    async def until(self, condition: Callable[[], bool]) -> float:
        """Wait until `condition` holds and return the elapsed seconds."""
        began = time.monotonic()
        while not condition():  # noqa: ASYNC110 -- fakes send no event
            await asyncio.sleep(0.005)
        return time.monotonic() - began


def run(
    test: Callable[[Harness, StageAutoscaler], Awaitable[None]],
    *,
    poll_seconds: float = 0.02,
    policy: ReplicaPolicy | None = None,
) -> None:
    """Run a test with a StageAutoscaler. The test calls `StageAutoscaler.run()`."""

    async def main(directory: str) -> None:
        scaler, server = FakeScaler(), grpc.aio.server()
        externalscaler_pb2_grpc.add_ExternalScalerServicer_to_server(scaler, server)
        address = f"unix:{directory}/scaler.sock"
        server.add_insecure_port(address)
        await server.start()
        async with asyncio.timeout(HANG_SECONDS), grpc.aio.insecure_channel(address) as channel:
            pool, notes = FakePool(), list[str]()
            harness = Harness(scaler, pool, notes, channel, server)
            loop = StageAutoscaler(
                ScalerClient(channel, TARGET),
                pool,
                policy or ReplicaPolicy(ReplicaBounds(0, 4, 0.1)),
                name="d",
                poll_seconds=poll_seconds,
                note=notes.append,
            )
            await test(harness, loop)
        await server.stop(None)

    with tempfile.TemporaryDirectory(prefix="s-") as directory:
        asyncio.run(main(directory))


async def cancel_and_wait(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_workers_scale_from_zero_to_the_maximum_and_back() -> None:
    async def scenario(harness: Harness, loop: StageAutoscaler) -> None:
        running = asyncio.create_task(loop.run())
        await harness.until(lambda: len(harness.scaler.received) > 6)
        assert harness.pool.sizes == []
        harness.scaler.seconds = 30.0
        harness.scaler.push(True)
        await harness.until(lambda: harness.pool.size == 4)
        assert harness.pool.sizes == [1, 4]
        harness.scaler.seconds = 2.4
        await harness.until(lambda: harness.pool.size == 1)
        harness.scaler.seconds = 0.0
        harness.scaler.push(False)
        await harness.until(lambda: harness.pool.size == 0)
        assert harness.pool.sizes == [1, 4, 1, 0]
        assert harness.notes[0] == "autoscaler: d: 0 -> 1 workers"
        assert {each.scalerMetadata["stage"] for each in harness.scaler.received} == {"denoising"}
        assert {each.scalerMetadata["model"] for each in harness.scaler.received} == {"emoji"}
        await cancel_and_wait(running)

    run(scenario)


def test_the_pool_limit_bounds_started_workers() -> None:
    async def scenario(harness: Harness, loop: StageAutoscaler) -> None:
        harness.pool.most, harness.scaler.seconds = 2, 30.0
        running = asyncio.create_task(loop.run())
        harness.scaler.push(True)
        await harness.until(lambda: harness.pool.size == 2)
        calls = len(harness.scaler.received)
        await harness.until(lambda: len(harness.scaler.received) > calls + 6)
        assert harness.pool.sizes == [1, 2]
        assert len(harness.notes) == 2
        await cancel_and_wait(running)

    run(scenario)


def test_a_push_starts_a_worker_long_before_the_next_poll() -> None:
    async def scenario(harness: Harness, loop: StageAutoscaler) -> None:
        running = asyncio.create_task(loop.run())
        await harness.until(lambda: len(harness.scaler.received) >= 4)  # three calls of the first poll, and the stream
        harness.scaler.push(True)
        assert await harness.until(lambda: harness.pool.size == 1) < 5
        await cancel_and_wait(running)

    run(scenario, poll_seconds=1_000.0)


@dataclass
class RecordingPolicy(ReplicaPolicy):
    """A policy that records `is_active` of each decision."""

    activity: list[bool] = field(default_factory=list)

    def decide(self, current: int, *, is_active: bool, demand: float | None) -> int:
        self.activity.append(is_active)
        return super().decide(current, is_active=is_active, demand=demand)


def test_a_push_between_two_polls_counts_as_activity_once() -> None:
    policy = RecordingPolicy(ReplicaBounds(1, 4, 0.1))

    async def scenario(harness: Harness, loop: StageAutoscaler) -> None:
        harness.scaler.is_active_when_polled = False
        running = asyncio.create_task(loop.run())
        await harness.until(lambda: len(policy.activity) >= 2)
        assert not any(policy.activity)
        harness.scaler.push(True)
        await harness.until(lambda: any(policy.activity))
        await harness.until(lambda: len(policy.activity) > policy.activity.index(True) + 2)
        assert policy.activity.count(True) == 1
        await cancel_and_wait(running)

    run(scenario, policy=policy)


def test_an_unavailable_scaler_changes_nothing_and_is_logged_once() -> None:
    async def scenario(harness: Harness, loop: StageAutoscaler) -> None:
        running = asyncio.create_task(loop.run())
        harness.scaler.seconds = 5.0
        harness.scaler.push(True)
        await harness.until(lambda: harness.pool.size == 2)
        del harness.notes[:], harness.scaler.received[:]
        harness.scaler.refusal = grpc.StatusCode.UNAVAILABLE
        harness.scaler.seconds = 0.0
        await harness.until(lambda: len(harness.scaler.received) >= 5)
        assert harness.pool.size == 2
        assert len(harness.notes) == 1
        assert harness.notes[0].startswith("autoscaler: d: the scaler did not answer")
        harness.scaler.refusal, harness.scaler.seconds = None, 9.0
        await harness.until(lambda: harness.pool.size == 4)
        await cancel_and_wait(running)

    run(scenario)


def test_an_unknown_stage_ends_the_loop() -> None:
    async def scenario(harness: Harness, loop: StageAutoscaler) -> None:
        harness.scaler.refusal = grpc.StatusCode.NOT_FOUND
        with pytest.raises(ExceptionGroup) as caught:
            await loop.run()
        assert {type(each) for each in caught.value.exceptions} == {NotFound}
        assert harness.pool.sizes == []

    run(scenario)
