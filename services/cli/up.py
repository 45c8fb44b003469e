"""`fleet up`: a whole fleet on this host, one process per service.

Workers listen on unix sockets in a private directory, the coordinator on a port of 127.0.0.1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import FleetError, InvalidInput, Unavailable
from common.rpc.client import open_channel
from common.settings import SettingsError
from common.state.embedded import EmbeddedStore, private_directory
from models.catalog import DEFAULT_MODEL, ServedModel, open_model
from models.registry import load_registry
from services.cli import up_flags
from services.cli.access import Access
from services.cli.autoscale import ScalerClient, StageAutoscaler, StageTarget
from services.cli.client import connect
from services.cli.generate import plugin_directories
from services.cli.options import BAD_INPUT, FAILED, SUCCESS, TERMINATED, run_async
from services.cli.options import INTERRUPTED as CTRL_C
from services.cli.replica_policy import ReplicaBounds, ReplicaPolicy
from services.cli.store import check_store
from services.cli.supervisor import Program, ServiceEnded, Supervisor
from services.cli.worker_pool import WorkerPool

_POLL_SECONDS = 0.1
_SCALE_SECONDS = 1.0
_COORDINATOR = "coordinator"


@dataclass(frozen=True)
class StageWorkers:
    """The workers of one service of a model. A worker's number is appended to `name` and to `socket`."""

    model: str
    service: str
    bounds: ReplicaBounds
    name: str
    socket: str
    options: tuple[str, ...]

    def program(self, number: int) -> Program:
        """The program of the worker with this number."""
        listen = ("--listen", f"{self.socket}{number}.sock")
        return Program(f"{self.name}{number}", ("serve", self.service, *listen, *self.options))


@dataclass(frozen=True)
class Plan:
    """The processes to run. `scaler` is the external scaler's address. `target_seconds` None: no autoscaling."""

    endpoint: str
    scaler: str
    target_seconds: float | None
    headroom: float
    coordinator: Program
    workers: tuple[StageWorkers, ...]


def main(argv: Sequence[str]) -> int:
    """Run a fleet until Ctrl-C or SIGTERM, after which the exit code is 0."""
    args = up_flags.arguments(argv)
    access = _access(os.environ)
    models = _models(args.model or [DEFAULT_MODEL])
    bounds = up_flags.replica_bounds(args, models)
    _check_degrees(up_flags.degrees(args), models)
    if args.redis:
        check_store(args.redis)
    endpoint = f"127.0.0.1:{up_flags.free_port(args.port)}"
    scaler = "" if args.scaler_port is None else f"127.0.0.1:{up_flags.free_port(args.scaler_port, 'scaler-port')}"
    with contextlib.ExitStack() as stack:
        directory = private_directory()
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        # The store is discarded when this process ends, so its writes need no fsync.
        store = None if args.redis else stack.enter_context(EmbeddedStore(appendfsync="no"))
        redis_flags = ("--redis", store.url, "--allow-data-loss") if store else ("--redis", args.redis)
        plan = _plan(models, bounds, args, endpoint, scaler, redis_flags, directory)
        code = run_async(_run(plan, store, access))
    return SUCCESS if code in (CTRL_C, TERMINATED) else code


def _access(environ: Mapping[str, str]) -> Access:
    """The credentials for the coordinator. Refuses TLS variables, which the coordinator would inherit."""
    if unused := sorted(name for name in environ if name.startswith("FLEET_TLS") and environ[name]):
        raise SettingsError(
            f"{unused[0]} is set, but `fleet up` serves only this host, without TLS; unset it, "
            "or start each service with `fleet serve`",
            field=unused[0],
        )
    return Access(api_key=environ.get("FLEET_API_KEY", ""))


def _models(references: Sequence[str]) -> list[ServedModel]:
    registry = load_registry(plugin_directories())
    models = [open_model(reference, registry) for reference in references]
    names = Counter(model.name for model in models)
    for name, count in names.items():
        if count > 1:
            raise InvalidInput(
                f"--model: {count} models have the name {name!r}; rename one with OTHER=DIR", field="model"
            )
    return models


def _check_degrees(degrees: Mapping[str, Any], models: Sequence[ServedModel]) -> None:
    """Check the parallel degrees before any process starts. Raises InvalidInput and FailedPrecondition."""
    if not degrees:
        return
    # Imported here because it imports torch, which this process needs only for worker groups.
    from services.denoising.settings import DenoisingSettings, check_group

    for model in models:
        check_group(model, DenoisingSettings(model=model.name, redis="", **degrees))


def _plan(
    models: Sequence[ServedModel],
    bounds: Mapping[str, ReplicaBounds],
    args: argparse.Namespace,
    endpoint: str,
    scaler: str,
    redis_flags: Sequence[str],
    directory: Path,
) -> Plan:
    references = {model.name: f"{model.name}={model.checkpoint.path.resolve()}" for model in models}
    served = [argument for reference in references.values() for argument in ("--model", reference)]
    coordinator = ("serve", _COORDINATOR, *served, "--listen", endpoint, *redis_flags)
    if args.autoscale and not scaler:
        scaler = f"unix:{directory}/scaler.sock"
    if scaler:
        coordinator += ("--scaler-listen", scaler)
    options = (*redis_flags, *(("--dtype", args.dtype) if args.dtype else ()))
    degrees = tuple(flag for axis, degree in up_flags.degrees(args).items() for flag in (f"--{axis}", str(degree)))
    workers: list[StageWorkers] = []
    for model in models:
        for spec in model.services:
            own_options = ("--model", references[model.name], *options)
            if spec.service == "denoising":
                own_options += degrees
            name = f"{spec.service}-" if len(models) == 1 else f"{model.name}/{spec.service}-"
            socket = f"unix:{directory}/{len(workers)}-"
            workers.append(StageWorkers(model.name, spec.service, bounds[spec.service], name, socket, own_options))
    target_seconds = args.target_seconds if args.autoscale else None
    program = Program(_COORDINATOR, coordinator)
    return Plan(endpoint, scaler, target_seconds, args.headroom, program, tuple(workers))


async def _run(plan: Plan, store: EmbeddedStore | None, access: Access) -> int:
    supervisor = Supervisor(_note)
    code = SUCCESS
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(supervisor.supervise(plan.coordinator))
            pools = [WorkerPool(supervisor, group.create_task, each.program, _note) for each in plan.workers]
            for workers, pool in zip(plan.workers, pools, strict=True):
                pool.resize(workers.bounds.least)
            group.create_task(_serve(plan, pools, supervisor, access))
            if store:
                group.create_task(_watch_store(store))
    except* FleetError as failures:
        for failure in _leaves(failures):
            _note(f"fleet up: {failure}")
            bad_input = isinstance(failure, ServiceEnded) and failure.code == BAD_INPUT
            code = BAD_INPUT if bad_input else FAILED
    finally:
        _note("stopping")
        await supervisor.stop([_COORDINATOR])  # First, because its running requests need the workers.
        await supervisor.stop(supervisor.running)
    return code


def _leaves(failures: ExceptionGroup[FleetError]) -> Iterator[FleetError]:
    """The errors of a group and its nested groups."""
    for each in failures.exceptions:
        if isinstance(each, ExceptionGroup):
            yield from _leaves(each)
        else:
            yield each


async def _serve(plan: Plan, pools: Sequence[WorkerPool], supervisor: Supervisor, access: Access) -> None:
    """Print that the fleet is ready, then run the autoscalers if `target_seconds` is set."""
    await _announce_ready(plan, supervisor, access)
    if plan.target_seconds is None:
        return
    async with open_channel(plan.scaler) as channel:
        scalers = [
            StageAutoscaler(
                ScalerClient(channel, StageTarget(workers.model, workers.service, plan.target_seconds)),
                pool,
                ReplicaPolicy(workers.bounds, headroom=plan.headroom),
                name=f"{workers.model}/{workers.service}",
                poll_seconds=_SCALE_SECONDS,
                note=_note,
            )
            for workers, pool in zip(plan.workers, pools, strict=True)
        ]
        async with asyncio.TaskGroup() as group:
            for scaler in scalers:
                group.create_task(scaler.run())


async def _announce_ready(plan: Plan, supervisor: Supervisor, access: Access) -> None:
    """Wait until the coordinator lists the minimum number of workers of each service, then print a line."""
    began = time.monotonic()
    async with connect(plan.endpoint, access) as client:
        while not supervisor.ready:
            await asyncio.sleep(_POLL_SECONDS)
            with contextlib.suppress(Unavailable):
                alive = {
                    (model.name, each.service): each.workers
                    for model in await client.models()
                    for each in model.services
                }
                supervisor.ready = all(
                    alive.get((each.model, each.service), 0) >= each.bounds.least for each in plan.workers
                )
    names = ", ".join(dict.fromkeys(each.model for each in plan.workers))
    sys.stdout.write(f"ready: {plan.endpoint} serves {names} ({time.monotonic() - began:.1f} s)\n")
    sys.stdout.flush()


async def _watch_store(store: EmbeddedStore) -> None:
    while store.is_running():  # noqa: ASYNC110 -- the store is another process, which sets no asyncio.Event
        await asyncio.sleep(_POLL_SECONDS * 5)
    raise Unavailable("the embedded store ended")


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
