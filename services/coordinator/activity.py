"""Lists requests with their current activities and estimated waiting times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from common.scaling import StageLoad
from common.state.activity import StageQueue, read_activities
from common.state.records import timestamp_of
from common.state.redis_client import Redis
from common.state.stage_loads import StageLoads
from fleet.v1 import generation_pb2 as pb


class RequestActivities:
    """Reads activities in one store operation, plus at most one per queue with waiting requests."""

    def __init__(self, redis: Redis, loads: StageLoads) -> None:
        self._redis = redis
        self._loads = loads

    async def list(self, services: Mapping[str, Sequence[str]], *, caller: str, most: int) -> pb.ListRequestsResponse:
        """List open requests of the models in `services`, then the newest ended requests. Raises Unavailable.

        `caller` restricts the list to requests of one caller. An empty `caller` selects all callers.
        """
        found = await read_activities(self._redis, services, caller=caller, most=most)
        queues = {queue for request in found.requests for queue in request.queues if queue is not None}
        loads = {queue: await self._loads.recent(queue.model, queue.service) for queue in queues}
        for request in found.requests:
            for activity, queue in zip(request.record.activities, request.queues, strict=True):
                if queue is not None and not loads[queue].unmeasured:
                    activity.estimated_seconds = _wait_seconds(loads[queue], queue, activity.requests_ahead)
        records = [request.record for request in found.requests]
        return pb.ListRequestsResponse(requests=records, time=timestamp_of(found.milliseconds))


def _wait_seconds(load: StageLoad, queue: StageQueue, ahead: int) -> float:
    """Seconds until the live workers finish the running work and `ahead` waiting requests of mean size."""
    mean = load.waiting_seconds / load.waiting_claims if load.waiting_claims else 0.0
    return (load.running_seconds + ahead * mean) / max(queue.live_workers, 1)
