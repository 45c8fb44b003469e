"""The autoscaling loop against an external scaler in this process that answers what a test says."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import grpc
import pytest

from common.errors import NotFound
from externalscaler import externalscaler_pb2 as pb
from externalscaler import externalscaler_pb2_grpc
from services.cli.autoscale import ScalerClient, StageAutoscaler, StageTarget
from services.cli.replica_policy import ReplicaBounds, ReplicaPolicy

TARGET = StageTarget("emoji", "denoising", 2.5)
Context = grpc.aio.ServicerContext[object, object]


class FakeScaler(externalscaler_pb2_grpc.ExternalScalerServicer):
    """Answers with `active` and `seconds`, or refuses every call with `refusal`.

    `is_active_when_polled` is what IsActive answers, where that differs from the stream.
    """

    def __init__(self) -> None:
        self.active = False
        self.is_active_when_polled: bool | None = None
        self.seconds = 0.0
        self.refusal: grpc.StatusCode | None = None
        self.asked: list[pb.ScaledObjectRef] = []
        self._changed = asyncio.Event()

    def push(self, active: bool) -> None:
        self.active = active
        self._changed.set()
        self._changed = asyncio.Event()

    async def _take(self, target: pb.ScaledObjectRef, context: Context) -> None:
        self.asked.append(target)
        if self.refusal is not None:
            await context.abort(self.refusal, "no stage of that name")

    async def IsActive(self, request: pb.ScaledObjectRef, context: Context) -> pb.IsActiveResponse:  # noqa: N802
        await self._take(request, context)
        polled = self.is_active_when_polled
        return pb.IsActiveResponse(result=self.active if polled is None else polled)

    async def StreamIsActive(  # noqa: N802
        self, request: pb.ScaledObjectRef, context: Context
    ) -> AsyncIterator[pb.IsActiveResponse]:
        await self._take(request, context)
        while True:
            yield pb.IsActiveResponse(result=self.active)
            await self._changed.wait()

    async def GetMetricSpec(  # noqa: N802
        self, request: pb.ScaledObjectRef, context: Context
    ) -> pb.GetMetricSpecResponse:
        await self._take(request, context)
        target = float(request.scalerMetadata["targetSeconds"])
        return pb.GetMetricSpecResponse(metricSpecs=[pb.MetricSpec(metricName="wanted", targetSizeFloat=target)])

    async def StreamMetricSpec(  # noqa: N802
        self, request: pb.ScaledObjectRef, context: Context
    ) -> AsyncIterator[pb.GetMetricSpecResponse]:
        yield await self.GetMetricSpec(request, context)

    async def GetMetrics(self, request: pb.GetMetricsRequest, context: Context) -> pb.GetMetricsResponse:  # noqa: N802
        await self._take(request.scaledObjectRef, context)
        assert request.metricName == "wanted"
        value = pb.MetricValue(metricName="wanted", metricValueFloat=self.seconds)
        return pb.GetMetricsResponse(metricValues=[value])


@dataclass
class FakePool:
    """Replicas that are only counted."""

    size: int = 0
    most: int = 64
    sizes: list[int] = field(default_factory=list)

    def resize(self, count: int) -> None:
        self.size = count
        self.sizes.append(count)


@dataclass
class Scene:
    """A loop that runs, and what it works on."""

    scaler: FakeScaler
    pool: FakePool
    notes: list[str]
    channel: grpc.aio.Channel
    server: grpc.aio.Server

    async def until(self, condition: Callable[[], bool]) -> float:
        """Wait until it holds; the seconds that it took."""
        began = time.monotonic()
        while not condition():  # noqa: ASYNC110 -- a state of fakes, which send no event
            await asyncio.sleep(0.005)
        return time.monotonic() - began


def run(
    test: Callable[[Scene, StageAutoscaler], Awaitable[None]],
    *,
    poll_seconds: float = 0.02,
    policy: ReplicaPolicy | None = None,
) -> None:
    """Run a test with a loop that it starts."""

    async def main(directory: str) -> None:
        scaler, server = FakeScaler(), grpc.aio.server()
        externalscaler_pb2_grpc.add_ExternalScalerServicer_to_server(scaler, server)
        address = f"unix:{directory}/scaler.sock"
        server.add_insecure_port(address)
        await server.start()
        async with asyncio.timeout(30), grpc.aio.insecure_channel(address) as channel:
            pool, notes = FakePool(), list[str]()
            scene = Scene(scaler, pool, notes, channel, server)
            loop = StageAutoscaler(
                ScalerClient(channel, TARGET),
                pool,
                policy or ReplicaPolicy(ReplicaBounds(0, 4, 0.1)),
                name="d",
                poll_seconds=poll_seconds,
                note=notes.append,
            )
            await test(scene, loop)
        await server.stop(None)

    with tempfile.TemporaryDirectory(prefix="s-") as directory:
        asyncio.run(main(directory))


async def ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def test_from_zero_to_the_most_and_back() -> None:
    async def story(scene: Scene, loop: StageAutoscaler) -> None:
        running = asyncio.create_task(loop.run())
        await scene.until(lambda: len(scene.scaler.asked) > 6)
        assert scene.pool.sizes == []
        scene.scaler.seconds = 30.0
        scene.scaler.push(True)
        await scene.until(lambda: scene.pool.size == 4)
        assert scene.pool.sizes == [1, 4]
        scene.scaler.seconds = 2.4
        await scene.until(lambda: scene.pool.size == 1)
        scene.scaler.seconds = 0.0
        scene.scaler.push(False)
        await scene.until(lambda: scene.pool.size == 0)
        assert scene.pool.sizes == [1, 4, 1, 0]
        assert scene.notes[0] == "autoscaler: d: 0 -> 1 workers"
        assert {each.scalerMetadata["stage"] for each in scene.scaler.asked} == {"denoising"}
        assert {each.scalerMetadata["model"] for each in scene.scaler.asked} == {"emoji"}
        await ended(running)

    run(story)


def test_no_more_workers_are_started_than_can_run() -> None:
    async def story(scene: Scene, loop: StageAutoscaler) -> None:
        scene.pool.most, scene.scaler.seconds = 2, 30.0
        running = asyncio.create_task(loop.run())
        scene.scaler.push(True)
        await scene.until(lambda: scene.pool.size == 2)
        polls = len(scene.scaler.asked)
        await scene.until(lambda: len(scene.scaler.asked) > polls + 6)
        assert scene.pool.sizes == [1, 2]
        assert len(scene.notes) == 2
        await ended(running)

    run(story)


def test_a_push_starts_a_worker_long_before_the_next_poll() -> None:
    async def story(scene: Scene, loop: StageAutoscaler) -> None:
        running = asyncio.create_task(loop.run())
        await scene.until(lambda: len(scene.scaler.asked) >= 4)  # the first poll, and the stream
        scene.scaler.push(True)
        assert await scene.until(lambda: scene.pool.size == 1) < 5
        await ended(running)

    run(story, poll_seconds=1_000.0)


@dataclass
class NotedPolicy(ReplicaPolicy):
    """A policy that notes the activity of each decision."""

    activity: list[bool] = field(default_factory=list)

    def decide(self, current: int, *, is_active: bool, demand: float | None) -> int:
        self.activity.append(is_active)
        return super().decide(current, is_active=is_active, demand=demand)


def test_a_push_between_two_polls_counts_as_activity_once() -> None:
    policy = NotedPolicy(ReplicaBounds(1, 4, 0.1))

    async def story(scene: Scene, loop: StageAutoscaler) -> None:
        scene.scaler.is_active_when_polled = False
        running = asyncio.create_task(loop.run())
        await scene.until(lambda: len(policy.activity) >= 2)
        assert not any(policy.activity)
        scene.scaler.push(True)
        await scene.until(lambda: any(policy.activity))
        await scene.until(lambda: len(policy.activity) > policy.activity.index(True) + 2)
        assert policy.activity.count(True) == 1
        await ended(running)

    run(story, policy=policy)


def test_a_scaler_that_is_away_changes_nothing_and_is_noted_once() -> None:
    async def story(scene: Scene, loop: StageAutoscaler) -> None:
        running = asyncio.create_task(loop.run())
        scene.scaler.seconds = 5.0
        scene.scaler.push(True)
        await scene.until(lambda: scene.pool.size == 2)
        del scene.notes[:], scene.scaler.asked[:]
        scene.scaler.refusal = grpc.StatusCode.UNAVAILABLE
        scene.scaler.seconds = 0.0
        await scene.until(lambda: len(scene.scaler.asked) >= 5)
        assert scene.pool.size == 2
        assert len(scene.notes) == 1
        assert scene.notes[0].startswith("autoscaler: d: the scaler did not answer")
        scene.scaler.refusal, scene.scaler.seconds = None, 9.0
        await scene.until(lambda: scene.pool.size == 4)
        await ended(running)

    run(story)


def test_a_stage_that_the_scaler_does_not_know_ends_the_loop() -> None:
    async def story(scene: Scene, loop: StageAutoscaler) -> None:
        scene.scaler.refusal = grpc.StatusCode.NOT_FOUND
        with pytest.raises(ExceptionGroup) as caught:
            await loop.run()
        assert {type(each) for each in caught.value.exceptions} == {NotFound}
        assert scene.pool.sizes == []

    run(story)
