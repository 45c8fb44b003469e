"""Gauges of each service of a model, from what a coordinator reads at its heartbeats."""

from __future__ import annotations

from common.metrics import OPEN_REQUESTS, QUEUE_LENGTH, QUEUED_SECONDS, WORKERS_DEAD, WORKERS_HELD, WORKERS_LIVE
from common.scaling import StageLoad
from common.state.workers import ServiceLoad


def set_service_gauges(model: str, service: str, load: ServiceLoad, work: StageLoad) -> None:
    """Set them to the load of a service. Each coordinator sets the same, as all of them read one store."""
    QUEUE_LENGTH.labels(service, model).set(load.queued)
    QUEUED_SECONDS.labels(service, model).set(work.queued_seconds)
    OPEN_REQUESTS.labels(service, model).set(work.open_requests)
    WORKERS_HELD.labels(service, model).set(work.workers_held)
    WORKERS_LIVE.labels(service, model).set(len(load.workers))
    WORKERS_DEAD.labels(service, model).set(load.dead)
