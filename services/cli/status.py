"""`fleet status`: the services of a running fleet, its store and its latest requests."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence

from fleet.v1 import generation_pb2, worker_pb2
from services.cli.access import Access, access_of
from services.cli.client import connect, state_name
from services.cli.incompatible import HEAD, incompatible_rows
from services.cli.options import SUCCESS, add_endpoint, command_parser, endpoint_of, run_async
from services.start_up import plain

_REQUESTS = 10
_MIB = 1 << 20


def main(argv: Sequence[str]) -> int:
    """Print a line a service, a line about the store, and a line a request."""
    parser = command_parser(
        "status", "Show the models of a running fleet, their workers, its store, and the latest requests."
    )
    add_endpoint(parser)
    args = parser.parse_args(argv)
    return run_async(_status(endpoint_of(args.endpoint), access_of(args)))


async def _status(endpoint: str, access: Access) -> int:
    async with connect(endpoint, access) as client:
        overview = await client.overview()
        requests = await client.requests(_REQUESTS)
    services = [
        (
            model.name,
            each.service,
            str(each.workers),
            f"{each.busy}/{each.capacity}",
            str(each.queued),
            f"{'~' if each.unmeasured else ''}{each.queued_seconds:.1f}",
            degrees_text(each.groups),
        )
        for model in overview.models
        for each in model.services
    ]
    sys.stdout.write(table(("MODEL", "SERVICE", "WORKERS", "BUSY", "QUEUED", "SECONDS", "DEGREES"), services))
    kernels = [
        (model.name, each.service, *kernel_cells(package))
        for model in overview.models
        for each in model.services
        for package in each.kernels
    ]
    if kernels:
        sys.stdout.write("\n" + table(("MODEL", "SERVICE", "KERNELS", "VERSION", "STATE"), kernels))
    refused = [(model.name, *refused_cells(each)) for model in overview.models for each in model.refused_workers]
    if refused:
        sys.stdout.write("\n" + table(("MODEL", "SERVICE", "REFUSED WORKER", "LATEST (UTC)", "REASON"), refused))
    if incompatible := incompatible_rows(overview):
        sys.stdout.write("\n" + table(HEAD, incompatible))
    sys.stdout.write(store_text(overview.store) + "\n")
    records = [
        (
            record.request_id,
            state_name(record.state),
            record.model,
            f"{record.created_at.ToDatetime():%Y-%m-%d %H:%M:%S}",
            shortened(record.parameters.prompt),
        )
        for record in requests
    ]
    if records:
        sys.stdout.write("\n" + table(("REQUEST", "STATE", "MODEL", "CREATED (UTC)", "PROMPT"), records))
    return SUCCESS


def store_text(store: generation_pb2.StoreStatus) -> str:
    """A line about the memory of the request store."""
    used = f"STORE  {store.used_bytes / _MIB:.1f} MiB"
    if store.is_full:
        return f"{used}, which is full: requests are refused from {store.limit_bytes / _MIB:.1f} MiB on"
    if store.limit_bytes:
        return f"{used}; requests are refused from {store.limit_bytes / _MIB:.1f} MiB on"
    return used


def degrees_text(groups: Iterable[worker_pb2.Degrees]) -> str:
    """The degrees of the worker groups among a service's workers, without those that are 1: "2 of tp=2 ulysses=2"."""
    counts: Counter[str] = Counter()
    for degrees in groups:
        named = {"tp": degrees.tp, "ulysses": degrees.ulysses, "ring": degrees.ring, "cfg": degrees.cfg}
        counts[" ".join(f"{axis}={degree}" for axis, degree in named.items() if degree > 1)] += 1
    return ", ".join(text if count == 1 else f"{count} of {text}" for text, count in sorted(counts.items()))


def kernel_cells(package: worker_pb2.KernelPackage) -> tuple[str, str, str]:
    """Name, version and state of a kernel package: in use, or its replacement and the error."""
    error = plain(" ".join(package.error.split()))
    state = f"unusable, {package.replacement} instead: {error}" if error else "in use"
    return package.name, package.version, state


def refused_cells(refused: worker_pb2.RefusedWorker) -> tuple[str, str, str, str]:
    """Service, worker, time and reason of a worker that was refused."""
    moment = f"{refused.refused_at.ToDatetime():%Y-%m-%d %H:%M:%S}"
    return refused.service, plain(refused.worker_id), moment, plain(" ".join(refused.reason.split()))


def shortened(text: str, length: int = 48) -> str:
    """One line of at most that many characters."""
    line = plain(" ".join(text.split()))
    return line if len(line) <= length else line[: length - 1] + "…"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, two blanks apart."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
    return "\n".join(line.rstrip() for line in lines) + "\n"
