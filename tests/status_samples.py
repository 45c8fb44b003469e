"""Fixed replies of a fleet, for tests of the view of `fleet status`."""

from __future__ import annotations

from datetime import UTC, datetime

from common.state.records import timestamp_of
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import worker_pb2
from services.cli.status_cells import Snapshot

NOW_MS = 1_700_000_600_000
TAKEN_AT = datetime(2023, 11, 14, 22, 23, 20, tzinfo=UTC)
KIND = pb.ActivityKind


def service(name: str, **fields: object) -> pb.ServiceStatus:
    """A stage with one worker."""
    known: dict[str, object] = {"workers": 1, "capacity": 1, **fields}
    return pb.ServiceStatus(service=name, **known)  # type: ignore[arg-type]


def overview() -> pb.ListModelsResponse:
    """One model with two stages, and its store."""
    pace = pb.ServicePace(
        shape="1024x1024 outputs=1 branches=2", seconds_per_step=0.412, measured_at=timestamp_of(NOW_MS)
    )
    denoising = service(
        "denoising",
        workers=2,
        capacity=2,
        busy=2,
        queued=3,
        queued_seconds=24.7,
        dead_workers=1,
        open_requests=5,
        reports_steps=True,
        paces=[pace],
        groups=[worker_pb2.Degrees(tp=2, ulysses=1, ring=1, cfg=1)],
        kernels=[worker_pb2.KernelPackage(name="fa3-fwd", version="0.0.3", error="OSError: a", replacement="cuDNN")],
        incompatible_workers=[
            worker_pb2.IncompatibleWorker(worker_id="denoising-new", variant="image", reason="it needs mask: Latents")
        ],
    )
    refused = worker_pb2.RefusedWorker(
        worker_id="denoising-host-9", service="denoising", reason="another checkpoint", refused_at=timestamp_of(NOW_MS)
    )
    model = pb.Model(
        name="flux",
        pipeline_name="FluxPipeline",
        fingerprint="f" * 64,
        services=[service("text_encoding", unmeasured=True, queued_seconds=10), denoising],
        refused_workers=[refused],
    )
    store = pb.StoreStatus(
        used_bytes=12 << 20,
        max_bytes=100 << 20,
        limit_bytes=90 << 20,
        role="master",
        is_durable=True,
        appendonly="yes",
        appendfsync="always",
        maxmemory_policy="noeviction",
        replicas=2,
        required_replicas=1,
        round_trip_seconds=0.0004,
    )
    return pb.ListModelsResponse(models=[model], store=store)


def record(
    name: str, state: pb.RequestState.ValueType, prompt: str, *activities: pb.RequestActivity
) -> pb.RequestRecord:
    """A request that was accepted 75 s ago; an ended request took 20 s."""
    return pb.RequestRecord(
        request_id=name,
        state=state,
        model="flux",
        parameters=pb.GenerationParameters(prompt=prompt),
        created_at=timestamp_of(NOW_MS - 75_000),
        updated_at=timestamp_of(NOW_MS - 55_000),
        activities=activities,
    )


def activity(kind: pb.ActivityKind.ValueType, service: str = "denoising", **fields: object) -> pb.RequestActivity:
    """The activity of a request."""
    return pb.RequestActivity(kind=kind, service=service, **fields)  # type: ignore[arg-type]


def requests() -> list[pb.RequestRecord]:
    """One open request per kind of activity, a succeeded request and a failed request."""
    running, ended = pb.REQUEST_STATE_RUNNING, pb.REQUEST_STATE_SUCCEEDED
    runs = activity(
        KIND.ACTIVITY_KIND_RUNNING, worker_id="denoising-host-7", step=12, total_steps=28, since=timestamp_of(NOW_MS)
    )
    waits = activity(KIND.ACTIVITY_KIND_QUEUED, total_steps=28, requests_ahead=3, estimated_seconds=12.4)
    failed = record("failed0000000000", pb.REQUEST_STATE_FAILED, "a fig")
    failed.error.code = "INTERNAL"
    return [
        record("retries000000000", running, "a kiwi", activity(KIND.ACTIVITY_KIND_RETRY, worker_id="denoising-host-3")),
        record("inherited0000000", running, "a plum", activity(KIND.ACTIVITY_KIND_TAKE_OVER, service="")),
        record("runs000000000000", running, "a red apple", runs),
        record("queued0000000000", pb.REQUEST_STATE_QUEUED, "a pear", waits),
        record("noworker00000000", running, "a lime", activity(KIND.ACTIVITY_KIND_NO_WORKER, requests_ahead=0)),
        record("between000000000", running, "a date", activity(KIND.ACTIVITY_KIND_COORDINATOR, service="")),
        record("older00000000000", running, "a nut", activity(KIND.ACTIVITY_KIND_UNSPECIFIED, service="")),
        record("ended00000000000", ended, "a cherry"),
        failed,
    ]


def snapshot(*records: pb.RequestRecord) -> Snapshot:
    """The replies, with the given requests or, by default, with the requests of requests()."""
    listing = pb.ListRequestsResponse(requests=records or requests(), time=timestamp_of(NOW_MS))
    return Snapshot(overview(), listing, TAKEN_AT)


NOTHING = Snapshot(pb.ListModelsResponse(), pb.ListRequestsResponse(), TAKEN_AT)
"""A fleet without models and requests, whose coordinator reports nothing about the store."""
