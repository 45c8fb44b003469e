"""The cell texts of `fleet status`, shared by the plain output and the live view."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeAlias

from fleet.v1 import generation_pb2, worker_pb2
from fleet.v1.generation_pb2 import ActivityKind
from services.cli.client import state_name
from services.cli.incompatible import HEAD as INCOMPATIBLE_HEAD
from services.cli.incompatible import incompatible_rows
from services.start_up import plain

_MIB = 1 << 20

Rows: TypeAlias = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Snapshot:
    """Responses of a fleet, and their time of arrival by the clock of this host."""

    overview: generation_pb2.ListModelsResponse
    listing: generation_pb2.ListRequestsResponse
    taken_at: datetime

    @property
    def store_time(self) -> datetime:
        """The time of the store; for a coordinator of an earlier version, the time of this host."""
        return self.listing.time.ToDatetime(UTC) if self.listing.HasField("time") else self.taken_at

    def age(self, record: generation_pb2.RequestRecord) -> float:
        """Seconds from the admission of a request until now, or until its end."""
        is_ended = record.state >= generation_pb2.REQUEST_STATE_SUCCEEDED
        until = record.updated_at.ToDatetime(UTC) if is_ended else self.store_time
        return max((until - record.created_at.ToDatetime(UTC)).total_seconds(), 0.0)


@dataclass(frozen=True)
class Notice:
    """A table about workers that is shown only when it has rows."""

    head: Sequence[str]
    rows: Callable[[generation_pb2.ListModelsResponse], Rows]


def _kernel_rows(overview: generation_pb2.ListModelsResponse) -> Rows:
    return [
        (model.name, each.service, *kernel_cells(package))
        for model in overview.models
        for each in model.services
        for package in each.kernels
    ]


def _refused_rows(overview: generation_pb2.ListModelsResponse) -> Rows:
    return [(model.name, *refused_cells(each)) for model in overview.models for each in model.refused_workers]


NOTICES: Sequence[Notice] = (
    Notice(("MODEL", "SERVICE", "KERNELS", "VERSION", "STATE"), _kernel_rows),
    Notice(("MODEL", "SERVICE", "REFUSED WORKER", "LATEST (UTC)", "REASON"), _refused_rows),
    Notice(INCOMPATIBLE_HEAD, incompatible_rows),
)


def seconds_text(service: generation_pb2.ServiceStatus) -> str:
    """Queued seconds of a service. A leading ~ marks a sum that includes an assumed pace."""
    return f"{'~' if service.unmeasured else ''}{service.queued_seconds:.1f}"


def pace_text(service: generation_pb2.ServiceStatus) -> str:
    """The most recently measured pace, such as "0.41 s/step"; "-" before the first measurement."""
    if not service.paces:
        return "-"
    return f"{service.paces[0].seconds_per_step:.2g} s/{'step' if service.reports_steps else 'request'}"


def workers_text(service: generation_pb2.ServiceStatus) -> str:
    """Number of live workers, and of dead workers if any, such as "2 (1 dead)"."""
    return f"{service.workers} ({service.dead_workers} dead)" if service.dead_workers else str(service.workers)


def activity_text(record: generation_pb2.RequestRecord) -> str:
    """The current activity of an open request, or the error code of a failed request."""
    if record.activities:
        return "; ".join(map(_one_activity, record.activities))
    return plain(record.error.code) if record.state == generation_pb2.REQUEST_STATE_FAILED else ""


def progress_percent(activity: generation_pb2.RequestActivity) -> float | None:
    """Percentage of completed steps; None for a service without steps."""
    return 100.0 * activity.step / activity.total_steps if activity.total_steps else None


def _one_activity(activity: generation_pb2.RequestActivity) -> str:
    percent = progress_percent(activity)
    steps = "" if percent is None else f" {activity.step}/{activity.total_steps} ({percent:.0f}%)"
    service, worker = plain(activity.service), plain(activity.worker_id)
    match activity.kind:
        case ActivityKind.ACTIVITY_KIND_RUNNING:
            return f"{service}{steps} on {worker}"
        case ActivityKind.ACTIVITY_KIND_QUEUED:
            about = f", about {activity.estimated_seconds:.0f} s" if activity.HasField("estimated_seconds") else ""
            return f"queued at {service}, {activity.requests_ahead} ahead{about}"
        case ActivityKind.ACTIVITY_KIND_NO_WORKER:
            return f"waits for a worker of {service}: no live worker is compatible"
        case ActivityKind.ACTIVITY_KIND_RETRY:
            return f"waits for a retry of {service}{steps}" + (f": {worker} is lost" if worker else "")
        case ActivityKind.ACTIVITY_KIND_TAKE_OVER:
            return "waits for another coordinator to take it over"
        case ActivityKind.ACTIVITY_KIND_COORDINATOR:
            return "at its coordinator, between stages"
        case _:
            return "unknown: its coordinator is of an earlier version"


def duration_text(seconds: float) -> str:
    """A duration in at most two units: "12s", "3m05s", "2h03m", "4d02h"."""
    whole = int(seconds)
    for unit, length, minor, part in (("d", 86_400, "h", 3_600), ("h", 3_600, "m", 60), ("m", 60, "s", 1)):
        if whole >= length:
            return f"{whole // length}{unit}{whole % length // part:02}{minor}"
    return f"{whole}s"


def service_rows(overview: generation_pb2.ListModelsResponse) -> Iterator[Sequence[str]]:
    """One row per service of each model."""
    for model in overview.models:
        for each in model.services:
            yield (
                model.name,
                each.service,
                str(each.workers),
                f"{each.busy}/{each.capacity}",
                str(each.queued),
                seconds_text(each),
                degrees_text(each.groups),
            )


def pace_rows(overview: generation_pb2.ListModelsResponse) -> Iterator[Sequence[str]]:
    """One row per service with a measured pace or dead workers."""
    for model in overview.models:
        for each in model.services:
            if each.paces or each.dead_workers:
                shape = each.paces[0].shape if each.paces else ""
                yield model.name, each.service, pace_text(each), shape, str(each.dead_workers)


def request_rows(snapshot: Snapshot) -> Iterator[Sequence[str]]:
    """One row per request, open requests first."""
    for record in snapshot.listing.requests:
        yield (
            record.request_id,
            state_name(record.state),
            record.model,
            f"{record.created_at.ToDatetime():%Y-%m-%d %H:%M:%S}",
            shortened(record.parameters.prompt),
        )


def activity_rows(snapshot: Snapshot) -> Iterator[Sequence[str]]:
    """One row per open request whose activity is known."""
    for record in snapshot.listing.requests:
        if record.activities:
            yield record.request_id, duration_text(snapshot.age(record)), activity_text(record)


def plain_text(snapshot: Snapshot) -> str:
    """All tables as text, one line per row."""
    heads = ("MODEL", "SERVICE", "WORKERS", "BUSY", "QUEUED", "SECONDS", "DEGREES")
    parts = [table(heads, [*service_rows(snapshot.overview)])]
    if paces := [*pace_rows(snapshot.overview)]:
        parts.append("\n" + table(("MODEL", "SERVICE", "PACE", "SHAPE", "DEAD WORKERS"), paces))
    for notice in NOTICES:
        if rows := notice.rows(snapshot.overview):
            parts.append("\n" + table(notice.head, rows))
    store = snapshot.overview.store
    parts.append(f"{store_text(store)}\n")
    parts += [f"       {health}\n" for health in (store_health_text(store),) if health]
    if records := [*request_rows(snapshot)]:
        parts.append("\n" + table(("REQUEST", "STATE", "MODEL", "CREATED (UTC)", "PROMPT"), records))
    if activities := [*activity_rows(snapshot)]:
        parts.append("\n" + table(("OPEN REQUEST", "AGE", "NOW"), activities))
    return "".join(parts)


def store_health_text(store: generation_pb2.StoreStatus) -> str:
    """Role, durability, replicas and round-trip time of the store. Empty for coordinators of earlier versions."""
    if not store.round_trip_seconds:  # Coordinators of earlier versions do not send it.
        return ""
    parts = ["primary" if store.role == "master" else plain(store.role) or "role unknown"]
    if store.follows_sentinels:
        parts[0] += ", selected by Sentinel"
    settings = f"appendonly={plain(store.appendonly) or '?'} appendfsync={plain(store.appendfsync) or '?'}"
    durable = "durability unknown"
    if store.HasField("is_durable"):
        durable = "durable" if store.is_durable else "not durable"
    parts.append(f"{durable} ({settings})")
    required = f" ({store.required_replicas} required)" if store.required_replicas else ""
    parts.append(f"{store.replicas} replica{'' if store.replicas == 1 else 's'}{required}")
    parts.append(f"round trip {store.round_trip_seconds * 1_000:.1f} ms")
    return ", ".join(parts)


def store_text(store: generation_pb2.StoreStatus) -> str:
    """One line about the memory of the request store."""
    used = f"STORE  {store.used_bytes / _MIB:.1f} MiB"
    if store.is_full:
        return f"{used}, full: requests are refused above {store.limit_bytes / _MIB:.1f} MiB"
    if store.limit_bytes:
        return f"{used}; requests are refused above {store.limit_bytes / _MIB:.1f} MiB"
    return used


def degrees_text(groups: Iterable[worker_pb2.Degrees]) -> str:
    """The parallel degrees above 1 of a service's worker groups, such as "2 of tp=2 ulysses=2"."""
    counts: Counter[str] = Counter()
    for degrees in groups:
        named = {"tp": degrees.tp, "ulysses": degrees.ulysses, "ring": degrees.ring, "cfg": degrees.cfg}
        counts[" ".join(f"{axis}={degree}" for axis, degree in named.items() if degree > 1)] += 1
    return ", ".join(text if count == 1 else f"{count} of {text}" for text, count in sorted(counts.items()))


def kernel_cells(package: worker_pb2.KernelPackage) -> tuple[str, str, str]:
    """Name, version and state of a kernel package: in use, or its replacement and the error."""
    error = plain(" ".join(package.error.split()))
    state = f"unusable, {package.replacement} is used: {error}" if error else "in use"
    return package.name, package.version, state


def refused_cells(refused: worker_pb2.RefusedWorker) -> tuple[str, str, str, str]:
    """Service, worker, time and reason of a refused worker."""
    moment = f"{refused.refused_at.ToDatetime():%Y-%m-%d %H:%M:%S}"
    return refused.service, plain(refused.worker_id), moment, plain(" ".join(refused.reason.split()))


def shortened(text: str, length: int = 48) -> str:
    """The text on one line of at most `length` characters."""
    line = plain(" ".join(text.split()))
    return line if len(line) <= length else line[: length - 1] + "…"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows with aligned columns, two spaces apart. Terminal control characters are replaced."""
    rows = [[plain(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    return "\n".join(line.rstrip() for line in lines) + "\n"
