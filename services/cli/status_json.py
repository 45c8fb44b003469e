"""`fleet status --json`: one JSON document per call. Its fields are a public contract; see services/README.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from fleet.v1 import generation_pb2, worker_pb2
from fleet.v1.generation_pb2 import ActivityKind
from services.cli.client import state_name
from services.cli.status_cells import Snapshot, progress_percent, shortened

FIELDS: Mapping[str, str] = {
    "time": "time of the responses, by the clock of this host",
    "endpoint": "address of the fleet",
    "error": "with `--interval`: error of a failed call; `models` and `requests` are then empty, `store` is null",
    "models[].name": "name of the model in requests",
    "models[].pipeline_name": "the pipeline's `_class_name`",
    "models[].fingerprint": "digest of the checkpoint",
    "models[].services[].service": "service of the stage, such as `denoising`",
    "models[].services[].workers": "live workers",
    "models[].services[].dead_workers": "workers lost within the last 10 minutes that have not registered again",
    "models[].services[].slots_busy": "requests running on its workers",
    "models[].services[].slots_total": "concurrent requests of all live workers together",
    "models[].services[].queued_requests": "requests waiting for a worker slot",
    "models[].services[].open_requests": "open requests that still need the service",
    "models[].services[].queued_seconds": "compute seconds of waiting and running work",
    "models[].services[].is_assumed": "whether `queued_seconds` includes an assumed pace, before the first measurement",
    "models[].services[].reports_steps": "whether a step is a denoising step; else it is the whole request",
    "models[].services[].paces[].shape": "variant, size, outputs and guidance branches of the measured requests",
    "models[].services[].paces[].seconds_per_step": "compute seconds of one step; the last measured shape is first",
    "models[].services[].paces[].measured_at": "time of the last measurement",
    "models[].services[].degrees[].tp": "tensor-parallel degree of a worker group; one entry per group",
    "models[].services[].degrees[].ulysses": "Ulysses degree",
    "models[].services[].degrees[].ring": "ring degree",
    "models[].services[].degrees[].cfg": "degree of guidance-branch parallelism",
    "models[].services[].kernels[].name": "optional kernel package of the workers",
    "models[].services[].kernels[].version": "version of the package",
    "models[].services[].kernels[].error": "error if the package is unusable; else empty",
    "models[].services[].kernels[].replacement": "replacement in use",
    "models[].services[].incompatible_workers[].worker_id": "live worker that cannot serve a variant",
    "models[].services[].incompatible_workers[].variant": "the variant",
    "models[].services[].incompatible_workers[].reason": "the slot with the mismatch",
    "models[].refused_workers[].worker_id": "worker refused in the last 10 minutes",
    "models[].refused_workers[].service": "service of the worker",
    "models[].refused_workers[].reason": "reason of the refusal",
    "models[].refused_workers[].refused_at": "time of the latest refusal",
    "requests[].request_id": "ID of the request; open requests come first",
    "requests[].state": "QUEUED, RUNNING, SUCCEEDED, FAILED, CANCELLED or EXPIRED",
    "requests[].model": "model of the request",
    "requests[].variant": "variant of the model",
    "requests[].caller": "name of the caller; empty without authentication",
    "requests[].priority": "as submitted",
    "requests[].created_at": "time of admission",
    "requests[].updated_at": "time of the last state change",
    "requests[].age_seconds": "seconds from admission until now, or until the end",
    "requests[].prompt": "first 47 characters of the prompt and an ellipsis, or a prompt of at most 48 characters",
    "requests[].error_code": "gRPC status code of a failed request",
    "requests[].activities[].kind": (
        "RUNNING, QUEUED (for a worker slot), NO_WORKER (no compatible live worker), RETRY, "
        "TAKE_OVER (its coordinator is lost), COORDINATOR (between stages) or UNSPECIFIED (its coordinator is of "
        "an earlier version)"
    ),
    "requests[].activities[].service": "service that runs the request, or that it waits for",
    "requests[].activities[].worker_id": "worker that runs the request, or that was lost before a retry",
    "requests[].activities[].since": "time when the worker was assigned; null while waiting",
    "requests[].activities[].step": "steps done",
    "requests[].activities[].total_steps": "total number of steps; 0 for a service without steps",
    "requests[].activities[].progress_percent": "percentage of completed steps; null for a service without steps",
    "requests[].activities[].requests_ahead": "requests ahead in the queue; null while running",
    "requests[].activities[].estimated_seconds": "estimated seconds until a worker is assigned; null where unknown",
    "store.used_bytes": "memory in use",
    "store.max_bytes": "the server's maxmemory; 0 without one",
    "store.limit_bytes": "memory in use above which requests are refused; 0 without a bound",
    "store.is_full": "whether requests are refused now",
    "store.role": "role of the server; `master` for a primary",
    "store.is_durable": "whether accepted requests survive a crash of the server's host; null where unknown",
    "store.appendonly": "`yes` or `no`; empty where unknown, like the next two",
    "store.appendfsync": "`always`, `everysec` or `no`",
    "store.maxmemory_policy": "such as `noeviction`",
    "store.replicas": "connected replicas",
    "store.required_replicas": "replicas that must acknowledge a request before it is accepted",
    "store.follows_sentinels": "whether Sentinel selects the server",
    "store.round_trip_seconds": "time of one PING from the coordinator",
}
"""Descriptions of fields by path. [] denotes each element of a list. Times are RFC 3339 in UTC."""


def document(endpoint: str, snapshot: Snapshot) -> dict[str, Any]:
    """The document for a snapshot."""
    return {
        "time": _text_of(snapshot.taken_at),
        "endpoint": endpoint,
        "error": None,
        "models": [_model(each) for each in snapshot.overview.models],
        "requests": [_request(snapshot, each) for each in snapshot.listing.requests],
        "store": _store(snapshot.overview.store),
    }


def failed_document(endpoint: str, error: str) -> dict[str, Any]:
    """The document for a failed call."""
    now = _text_of(datetime.now(UTC))
    return {"time": now, "endpoint": endpoint, "error": error, "models": [], "requests": [], "store": None}


def _text_of(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _time_of(moment: Timestamp) -> str:
    return _text_of(moment.ToDatetime(UTC))


def _model(model: generation_pb2.Model) -> dict[str, Any]:
    return {
        "name": model.name,
        "pipeline_name": model.pipeline_name,
        "fingerprint": model.fingerprint,
        "services": [_service(each) for each in model.services],
        "refused_workers": [
            {
                "worker_id": each.worker_id,
                "service": each.service,
                "reason": each.reason,
                "refused_at": _time_of(each.refused_at),
            }
            for each in model.refused_workers
        ],
    }


def _service(service: generation_pb2.ServiceStatus) -> dict[str, Any]:
    return {
        "service": service.service,
        "workers": service.workers,
        "dead_workers": service.dead_workers,
        "slots_busy": service.busy,
        "slots_total": service.capacity,
        "queued_requests": service.queued,
        "open_requests": service.open_requests,
        "queued_seconds": service.queued_seconds,
        "is_assumed": service.unmeasured,
        "reports_steps": service.reports_steps,
        "paces": [
            {"shape": each.shape, "seconds_per_step": each.seconds_per_step, "measured_at": _time_of(each.measured_at)}
            for each in service.paces
        ],
        "degrees": [
            {"tp": each.tp, "ulysses": each.ulysses, "ring": each.ring, "cfg": each.cfg} for each in service.groups
        ],
        "kernels": _kernels(service.kernels),
        "incompatible_workers": [
            {"worker_id": each.worker_id, "variant": each.variant, "reason": each.reason}
            for each in service.incompatible_workers
        ],
    }


def _kernels(packages: Sequence[worker_pb2.KernelPackage]) -> list[dict[str, Any]]:
    return [
        {"name": each.name, "version": each.version, "error": each.error, "replacement": each.replacement}
        for each in packages
    ]


def _request(snapshot: Snapshot, record: generation_pb2.RequestRecord) -> dict[str, Any]:
    return {
        "request_id": record.request_id,
        "state": state_name(record.state),
        "model": record.model,
        "variant": record.variant,
        "caller": record.caller,
        "priority": record.priority,
        "created_at": _time_of(record.created_at),
        "updated_at": _time_of(record.updated_at),
        "age_seconds": snapshot.age(record),
        "prompt": shortened(record.parameters.prompt),
        "error_code": record.error.code,
        "activities": [_activity(each) for each in record.activities],
    }


def _activity(activity: generation_pb2.RequestActivity) -> dict[str, Any]:
    return {
        "kind": ActivityKind.Name(activity.kind).removeprefix("ACTIVITY_KIND_"),
        "service": activity.service,
        "worker_id": activity.worker_id,
        "since": _time_of(activity.since) if activity.HasField("since") else None,
        "step": activity.step,
        "total_steps": activity.total_steps,
        "progress_percent": progress_percent(activity),
        "requests_ahead": activity.requests_ahead if activity.HasField("requests_ahead") else None,
        "estimated_seconds": activity.estimated_seconds if activity.HasField("estimated_seconds") else None,
    }


def _store(store: generation_pb2.StoreStatus) -> dict[str, Any]:
    return {
        "used_bytes": store.used_bytes,
        "max_bytes": store.max_bytes,
        "limit_bytes": store.limit_bytes,
        "is_full": store.is_full,
        "role": store.role,
        "is_durable": store.is_durable if store.HasField("is_durable") else None,
        "appendonly": store.appendonly,
        "appendfsync": store.appendfsync,
        "maxmemory_policy": store.maxmemory_policy,
        "replicas": store.replicas,
        "required_replicas": store.required_replicas,
        "follows_sentinels": store.follows_sentinels,
        "round_trip_seconds": store.round_trip_seconds,
    }
