"""Reads the activities of requests from the store, at a cost that does not depend on queue lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from common.state.connection import Arguments, run_script
from common.state.records import read_record, timestamp_of
from common.state.redis_client import Redis
from fleet.v1 import generation_pb2
from fleet.v1.generation_pb2 import ActivityKind, RequestActivity

MOST_REQUESTS = 200

_KINDS = {
    b"unknown": ActivityKind.ACTIVITY_KIND_UNSPECIFIED,
    b"running": ActivityKind.ACTIVITY_KIND_RUNNING,
    b"queued": ActivityKind.ACTIVITY_KIND_QUEUED,
    b"no_worker": ActivityKind.ACTIVITY_KIND_NO_WORKER,
    b"retry": ActivityKind.ACTIVITY_KIND_RETRY,
    b"take_over": ActivityKind.ACTIVITY_KIND_TAKE_OVER,
    b"coordinator": ActivityKind.ACTIVITY_KIND_COORDINATOR,
}


class StageQueue(NamedTuple):
    """Inputs of a wait time estimate: a service of a model, and the number of compatible live workers."""

    model: str
    service: str
    live_workers: int


class ActiveRequest(NamedTuple):
    """A record with its activities, and for each activity the queue in which the request waits, or None."""

    record: generation_pb2.RequestRecord
    queues: Sequence[StageQueue | None]


class Activities(NamedTuple):
    """Open requests, then the latest ended requests. `milliseconds` is the store's time since 1970."""

    milliseconds: int
    requests: Sequence[ActiveRequest]


async def read_activities(redis: Redis, services: Mapping[str, Sequence[str]], *, caller: str, most: int) -> Activities:
    """Return at most `most` requests. `services` maps models to their services in the order of the pipeline.

    `caller` restricts the result to requests of one caller; empty for all. Raises Unavailable.
    """
    places = [f"{model}/{service}" for model, names in services.items() for service in names]
    arguments: Arguments = {"caller": caller, "most": min(most, MOST_REQUESTS), "places": places}
    now, rows = await run_script(redis, "activities", arguments)
    return Activities(int(now), [_request(*row) for row in rows])


def _request(snapshot: Sequence[Any], rows: Sequence[Sequence[Any]]) -> ActiveRequest:
    record = read_record(snapshot)
    queues: list[StageQueue | None] = []
    for kind, service, worker, since, ahead, live, work, done in rows:
        step, total_steps = _steps(work, done)
        activity = RequestActivity(
            kind=_KINDS[kind],
            service=service.decode(),
            worker_id=worker.decode(),
            step=step,
            total_steps=total_steps,
            requests_ahead=ahead if ahead >= 0 else None,
        )
        if int(since) >= 0:
            activity.since.CopyFrom(timestamp_of(int(since)))
        record.activities.append(activity)
        is_queued = activity.kind == ActivityKind.ACTIVITY_KIND_QUEUED
        queues.append(StageQueue(record.model, activity.service, live) if is_queued else None)
    return ActiveRequest(record, queues)


def _steps(work: bytes, done: bytes) -> tuple[int, int]:
    """Return the completed steps and all steps; (0, 0) for work of one step and for missing work."""
    total = int(work.partition(b"|")[0] or 0)
    return (round(float(done or 0) * total), total) if total > 1 else (0, 0)
