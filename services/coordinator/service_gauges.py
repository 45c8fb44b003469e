"""Creates the metric series of a model before their first event, and sets its gauges from the store."""

from __future__ import annotations

from collections.abc import Iterable

from common.metrics import (
    HANDED_OVER_CALLS,
    LOST_CALLS,
    OPEN_REQUESTS,
    QUEUE_LENGTH,
    QUEUE_WAIT_SECONDS,
    QUEUED_SECONDS,
    REQUEST_SECONDS,
    REQUESTS,
    RESUMED_CALLS,
    RETRIES,
    SERVICE_SECONDS,
    STEP_CHECKPOINT_BYTES,
    STEP_CHECKPOINT_SAVES,
    STEP_CHECKPOINTS_RECEIVED,
    STEPS_SAVED,
    SUSPECTED_WORKERS,
    TAKEN_OVER_REQUESTS,
    WORKERS_DEAD,
    WORKERS_HELD,
    WORKERS_INCOMPATIBLE,
    WORKERS_LIVE,
)
from common.scaling import StageLoad
from common.state.records import State, StateValue, is_terminal
from common.state.workers import ServiceLoad

_COUNTED = (
    HANDED_OVER_CALLS,
    RESUMED_CALLS,
    STEP_CHECKPOINTS_RECEIVED,
    STEP_CHECKPOINT_BYTES,
    SUSPECTED_WORKERS,
    QUEUE_WAIT_SECONDS,
    SERVICE_SECONDS,
)


def create_series(model: str, services: Iterable[str]) -> None:
    """Create all series of a model with zeros. PromQL's increase() misses an event that creates its series."""
    for state in filter(is_terminal, State.values()):
        name = state_label(state)
        REQUESTS.labels(model, name)
        REQUEST_SECONDS.labels(model, name)
    for cause in ("left", "lost", "own"):
        TAKEN_OVER_REQUESTS.labels(model, cause)
    STEPS_SAVED.labels(model)
    for result in ("stored", "failed"):
        STEP_CHECKPOINT_SAVES.labels(result)
    for service in services:
        for metric in _COUNTED:
            metric.labels(service, model)
        for begun in ("yes", "no"):
            LOST_CALLS.labels(service, model, begun)
        for reason in ("lost", "handed_over", "full"):
            RETRIES.labels(service, model, reason)


def state_label(state: StateValue) -> str:
    """The value of the label `state`, such as SUCCEEDED."""
    return State.Name(state).removeprefix("REQUEST_STATE_")


def set_service_gauges(model: str, service: str, load: ServiceLoad, work: StageLoad) -> None:
    """Set the gauges of a service. Coordinators of one release set the same values, because they share the store."""
    QUEUE_LENGTH.labels(service, model).set(load.queued)
    QUEUED_SECONDS.labels(service, model).set(work.queued_seconds)
    OPEN_REQUESTS.labels(service, model).set(work.open_requests)
    WORKERS_HELD.labels(service, model).set(work.workers_held)
    WORKERS_LIVE.labels(service, model).set(len(load.workers))
    WORKERS_DEAD.labels(service, model).set(load.dead)
    WORKERS_INCOMPATIBLE.labels(service, model).set(load.num_unusable)
