"""KEDA's external scaler: the load of every stage of every model, for autoscalers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass

from common.errors import InvalidInput, NotFound, Unavailable
from common.log_context import log_scope
from common.logs import get_logger
from common.scaling import StageLoad
from common.state.stage_loads import StageActivity, StageLoads
from externalscaler import externalscaler_pb2 as pb
from services.coordinator.handlers import Function

_POLL_SECONDS = 0.25
"""Interval between two reads of the activity of a stage for StreamIsActive."""

_METADATA = "scalerMetadata"
_METRICS: Mapping[str, Callable[[StageLoad, float], float]] = {
    "wanted_seconds": lambda load, target: load.wanted_seconds(target),
    "queued_seconds": lambda load, _: load.queued_seconds,
}
_DEFAULT_METRIC = "wanted_seconds"

_log = get_logger(__name__)


@dataclass(frozen=True)
class ScaleTarget:
    """The target in the metadata of a KEDA trigger. `seconds` is the target value of the metric per replica."""

    model: str
    stage: str
    seconds: float
    metric: str


class ScalerService:
    """The RPCs of externalscaler.ExternalScaler, by name in `functions`. `stages` maps models to their services."""

    def __init__(self, stages: Mapping[str, tuple[str, ...]], loads: StageLoads) -> None:
        self._stages = stages
        self._loads = loads
        self.functions: dict[str, Function] = {
            "IsActive": self.is_active,
            "StreamIsActive": self.stream_is_active,
            "GetMetricSpec": self.get_metric_spec,
            "GetMetrics": self.get_metrics,
            "StreamMetricSpec": self.stream_metric_spec,
        }

    async def is_active(self, request: pb.ScaledObjectRef) -> pb.IsActiveResponse:
        """Whether an open request needs the stage."""
        target = self._target(request.scalerMetadata)
        return pb.IsActiveResponse(result=(await self._loads.activity(target.model, target.stage)).is_active)

    async def stream_is_active(self, request: pb.ScaledObjectRef) -> AsyncGenerator[pb.IsActiveResponse, None]:
        """Stream the current activity, then each change. Sends nothing while the store is unavailable.

        A stage that was needed only between two reads is reported as active, then as inactive.
        """
        target = self._target(request.scalerMetadata)
        sent: StageActivity | None = None
        while True:
            try:
                found = await self._loads.activity(target.model, target.stage)
            except Unavailable as error:
                with log_scope(model=target.model, stage=target.stage):
                    _log.warning("stage load unavailable", error=error)
            else:
                for is_active in _changes(sent, found):
                    yield pb.IsActiveResponse(result=is_active)
                sent = found
            await asyncio.sleep(_POLL_SECONDS)

    async def get_metric_spec(self, request: pb.ScaledObjectRef) -> pb.GetMetricSpecResponse:
        """The metric of the target."""
        return _spec(self._target(request.scalerMetadata))

    async def stream_metric_spec(self, request: pb.ScaledObjectRef) -> AsyncGenerator[pb.GetMetricSpecResponse, None]:
        """Send the metric of the target once, then hold the stream open, because the metric never changes."""
        yield _spec(self._target(request.scalerMetadata))
        await asyncio.Event().wait()

    async def get_metrics(self, request: pb.GetMetricsRequest) -> pb.GetMetricsResponse:
        """The current value of the target's metric. The requested name is not verified, because KEDA may prefix it."""
        target = self._target(request.scaledObjectRef.scalerMetadata)
        value = _METRICS[target.metric](await self._loads.read(target.model, target.stage), target.seconds)
        return pb.GetMetricsResponse(
            metricValues=[
                pb.MetricValue(
                    metricName=request.metricName or target.metric,
                    metricValue=math.ceil(value),
                    metricValueFloat=value,
                )
            ]
        )

    def _target(self, metadata: Mapping[str, str]) -> ScaleTarget:
        """Parse a trigger's metadata. Raises InvalidInput, and NotFound for an unknown model or stage."""
        model, stage = _required(metadata, "model"), _required(metadata, "stage")
        if model not in self._stages:
            raise NotFound(
                f"{_METADATA}.model: {model[:80]!r} is not served; models are {', '.join(sorted(self._stages))}",
                field=f"{_METADATA}.model",
            )
        if stage not in self._stages[model]:
            raise NotFound(
                f"{_METADATA}.stage: {stage[:80]!r} is not a stage of {model}; stages are "
                f"{', '.join(self._stages[model])}",
                field=f"{_METADATA}.stage",
            )
        metric = metadata.get("metricName", _DEFAULT_METRIC)
        if metric not in _METRICS:
            raise InvalidInput(
                f"{_METADATA}.metricName: {metric[:80]!r} is not {' or '.join(_METRICS)}",
                field=f"{_METADATA}.metricName",
            )
        return ScaleTarget(model, stage, _seconds(_required(metadata, "targetSeconds")), metric)


def _changes(before: StageActivity | None, now: StageActivity) -> tuple[bool, ...]:
    """The activities to send after a read; `before` is None for the first read."""
    if before is None or before.is_active != now.is_active:
        return (now.is_active,)
    was_needed = not now.is_active and now.last_needed_ms > before.last_needed_ms
    return (True, False) if was_needed else ()


def _required(metadata: Mapping[str, str], name: str) -> str:
    if not metadata.get(name):
        raise InvalidInput(
            f"{_METADATA}.{name} is missing; a trigger needs model, stage and targetSeconds",
            field=f"{_METADATA}.{name}",
        )
    return metadata[name]


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise InvalidInput(
            f'{_METADATA}.targetSeconds: {text[:80]!r} is not a number above 0; "30" works',
            field=f"{_METADATA}.targetSeconds",
        )
    return seconds


def _spec(target: ScaleTarget) -> pb.GetMetricSpecResponse:
    return pb.GetMetricSpecResponse(
        metricSpecs=[
            pb.MetricSpec(
                metricName=target.metric,
                targetSize=max(1, round(target.seconds)),
                targetSizeFloat=target.seconds,
            )
        ]
    )
