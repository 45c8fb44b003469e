"""An autoscaler for one host: polls the external scaler, as KEDA does, and resizes worker pools."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import grpc

from common.errors import DeadlineExceeded, ResourceExhausted, Unavailable
from common.rpc.status import from_rpc_error
from externalscaler import externalscaler_pb2 as pb
from externalscaler import externalscaler_pb2_grpc
from services.cli.replica_policy import ReplicaPolicy

_RETRY_SECONDS = 0.5
_CALL_SECONDS = 5.0
# After these errors, a later call may succeed.
_TEMPORARY = (Unavailable, DeadlineExceeded, ResourceExhausted)


class Pool(Protocol):
    """A set of worker processes with an adjustable number of replicas."""

    @property
    def size(self) -> int:
        """Replicas that are running or starting."""

    @property
    def most(self) -> int:
        """Maximum number of replicas."""

    def resize(self, count: int) -> None:
        """Start or stop replicas until `count` replicas remain. Does not wait for them."""


@dataclass(frozen=True)
class StageTarget:
    """A stage of a model, and its target: `target_seconds` of the metric wanted_seconds per worker."""

    model: str
    stage: str
    target_seconds: float

    @property
    def scaled_object(self) -> pb.ScaledObjectRef:
        """The message by which KEDA identifies the target to the scaler."""
        metadata = {"model": self.model, "stage": self.stage, "targetSeconds": f"{self.target_seconds:g}"}
        return pb.ScaledObjectRef(name=self.stage, namespace=self.model, scalerMetadata=metadata)


class ScalerClient:
    """Client of the external scaler for one target. Raises the FleetError that the scaler returned."""

    def __init__(self, channel: grpc.aio.Channel, target: StageTarget) -> None:
        self._stub: externalscaler_pb2_grpc.ExternalScalerAsyncStub = externalscaler_pb2_grpc.ExternalScalerStub(
            channel
        )
        self._object = target.scaled_object

    async def watch_active(self, changed: Callable[[bool], None]) -> None:
        """Call `changed` with the current activity and after each change, until the server ends the stream."""
        call = self._stub.StreamIsActive(self._object)
        try:
            with _translated():
                async for response in call:
                    changed(response.result)
        finally:
            call.cancel()

    async def is_active(self) -> bool:
        """Whether the target needs at least one replica."""
        with _translated():
            return (await self._stub.IsActive(self._object, timeout=_CALL_SECONDS)).result

    async def demand(self) -> float:
        """The number of replicas needed: the maximum ratio of a metric to its target value per replica."""
        with _translated():
            spec = await self._stub.GetMetricSpec(self._object, timeout=_CALL_SECONDS)
            return max([await self._ratio(each) for each in spec.metricSpecs], default=0.0)

    async def _ratio(self, spec: pb.MetricSpec) -> float:
        request = pb.GetMetricsRequest(scaledObjectRef=self._object, metricName=spec.metricName)
        answer = await self._stub.GetMetrics(request, timeout=_CALL_SECONDS)
        value = sum(each.metricValueFloat or each.metricValue for each in answer.metricValues)
        return value / (spec.targetSizeFloat or spec.targetSize)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


class StageAutoscaler:
    """Scales one pool. Polls its metric every `poll_seconds`, and starts a first replica when activity is pushed."""

    def __init__(
        self,
        client: ScalerClient,
        pool: Pool,
        policy: ReplicaPolicy,
        *,
        name: str,
        poll_seconds: float,
        note: Callable[[str], None],
    ) -> None:
        self._client = client
        self._pool = pool
        self._policy = policy
        self._name = name
        self._poll_seconds = poll_seconds
        self._note = note
        self._is_answered = True
        self._was_active = False

    async def run(self) -> None:
        """Scale until cancelled. Raises an ExceptionGroup for permanent errors such as NotFound."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_pushes())
            group.create_task(self._poll())

    async def _follow_pushes(self) -> None:
        while True:
            with self._noting_failures():
                await self._client.watch_active(self._activate)
            await asyncio.sleep(_RETRY_SECONDS)

    def _activate(self, is_active: bool) -> None:
        """Start the first replica. The next poll decides on further replicas by the metric.

        The push also counts as activity at the next poll, because short work may end before that poll.
        """
        self._was_active |= is_active
        if is_active and self._pool.size == 0:
            self._resize(self._policy.decide(0, is_active=True, demand=None))

    async def _poll(self) -> None:
        while True:
            with self._noting_failures():
                is_active, demand = await self._client.is_active(), await self._client.demand()
                is_active, self._was_active = is_active or self._was_active, False
                self._resize(self._policy.decide(self._pool.size, is_active=is_active, demand=demand))
                self._is_answered = True
            await asyncio.sleep(self._poll_seconds)

    def _resize(self, count: int) -> None:
        count = min(count, self._pool.most)
        if count != self._pool.size:
            self._note(f"autoscaler: {self._name}: {self._pool.size} -> {count} workers")
            self._pool.resize(count)

    @contextlib.contextmanager
    def _noting_failures(self) -> Iterator[None]:
        """Ignore temporary errors, which do not change the pool's size. Reports the first of consecutive errors."""
        try:
            yield
        except _TEMPORARY as error:
            if self._is_answered:
                self._is_answered = False
                self._note(
                    f"autoscaler: {self._name}: the scaler did not answer, the number of workers is unchanged: "
                    f"{error.message}"
                )
