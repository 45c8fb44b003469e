"""`fleet up`: a whole fleet on this machine, every service as a process of its own.

Workers listen on unix sockets in a private directory, the coordinator on a port of 127.0.0.1.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import FleetError, InvalidInput, Unavailable
from common.settings import SettingsError
from common.state.embedded import EmbeddedStore, private_directory
from models.catalog import DEFAULT_MODEL, ServedModel, open_model
from models.registry import load_registry
from services.cli.access import Access
from services.cli.client import connect
from services.cli.generate import plugin_directories
from services.cli.options import BAD_INPUT, DEGREES, FAILED, SUCCESS, TERMINATED, command_parser, run_async
from services.cli.options import INTERRUPTED as CTRL_C
from services.cli.parameters import whole_number
from services.cli.store import check_store
from services.cli.supervisor import Program, ServiceEnded, Supervisor

_POLL_SECONDS = 0.1
_COORDINATOR = "coordinator"


@dataclass(frozen=True)
class Plan:
    """What to run. `workers` counts the programs of each (model, service)."""

    endpoint: str
    coordinator: Program
    workers: Mapping[tuple[str, str], tuple[Program, ...]]

    @property
    def programs(self) -> list[Program]:
        """All of them."""
        return [self.coordinator, *(program for programs in self.workers.values() for program in programs)]


def main(argv: Sequence[str]) -> int:
    """Run until Ctrl-C or SIGTERM, which are the ways to end it and give exit code 0."""
    args = _arguments(argv)
    access = _access(os.environ)
    models = _models(args.model or [DEFAULT_MODEL])
    replicas = _replicas(args.replicas, models)
    _check_degrees(_degrees(args), models)
    if args.redis:
        check_store(args.redis)
    endpoint = f"127.0.0.1:{_free_port(args.port)}"
    scaler = None if args.scaler_port is None else f"127.0.0.1:{_free_port(args.scaler_port, 'scaler-port')}"
    with contextlib.ExitStack() as stack:
        directory = private_directory()
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        # What it keeps ends with this process, so there is nothing to be gained from waiting for the disk.
        store = None if args.redis else stack.enter_context(EmbeddedStore(appendfsync="no"))
        redis_words = ("--redis", store.url, "--allow-data-loss") if store else ("--redis", args.redis)
        plan = _plan(models, replicas, args, endpoint, scaler, redis_words, directory)
        code = run_async(_run(plan, store, access))
    return SUCCESS if code in (CTRL_C, TERMINATED) else code


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("up", "Run a whole fleet here, every service as a process of its own, until Ctrl-C.")
    parser.add_argument(
        "--model", action="append", metavar="DIR|NAME", help=f"what to serve, repeatable (default: {DEFAULT_MODEL})"
    )
    parser.add_argument(
        "--port",
        type=whole_number,
        default=50051,
        metavar="P",
        help="port on 127.0.0.1; 0: a free one (default: 50051)",
    )
    parser.add_argument(
        "--replicas", action="append", default=[], metavar="SERVICE=N", help="workers of a service, for each model"
    )
    parser.add_argument(
        "--scaler-port",
        type=whole_number,
        metavar="P",
        help="port on 127.0.0.1 of KEDA's external scaler; 0: a free one (default: none)",
    )
    parser.add_argument("--redis", metavar="URL", help="store to use (default: an embedded one, gone at the end)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="what to compute in")
    for axis in DEGREES:
        parser.add_argument(
            f"--{axis}", type=whole_number, metavar="N", help=f"{axis} degree of denoising, for a worker group"
        )
    args = parser.parse_args(argv)
    for name in ("port", "scaler_port"):
        if not 0 <= (vars(args)[name] or 0) < 65536:
            flag = "--" + name.replace("_", "-")
            raise SettingsError(f"{flag} must be 0 to 65535, not {vars(args)[name]}", field=name)
    return args


def _access(environ: Mapping[str, str]) -> Access:
    """How this process calls its own coordinator, which shares the environment with it."""
    if unused := sorted(name for name in environ if name.startswith("FLEET_TLS") and environ[name]):
        raise SettingsError(
            f"{unused[0]} is set, but `fleet up` serves this machine alone, in the clear; unset it, "
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
            raise InvalidInput(f"--model: {count} models are named {name!r}; write one as OTHER={name}", field="model")
    return models


def _replicas(texts: Sequence[str], models: Sequence[ServedModel]) -> dict[str, int]:
    known = list(dict.fromkeys(spec.service for model in models for spec in model.services))
    replicas: dict[str, int] = {}
    for text in texts:
        service, _, count = text.partition("=")
        if service not in known or not (count.isascii() and count.isdecimal() and 0 < int(count) <= 64):
            raise InvalidInput(
                f"--replicas must be SERVICE=N with N from 1 to 64 and SERVICE one of {', '.join(known)}, not {text!r}",
                field="replicas",
            )
        replicas[service] = int(count)
    return replicas


def _degrees(args: argparse.Namespace) -> dict[str, Any]:
    """The degrees that are given."""
    return {axis: vars(args)[axis] for axis in DEGREES if vars(args)[axis] is not None}


def _check_degrees(degrees: Mapping[str, Any], models: Sequence[ServedModel]) -> None:
    """Refuse a worker group that cannot be, before anything is started."""
    if not degrees:
        return
    # Brings torch, which a fleet without worker groups needs in its workers only.
    from services.denoising.settings import DenoisingSettings, check_group

    for model in models:
        check_group(model, DenoisingSettings(model=model.name, redis="", **degrees))


def _free_port(port: int, flag: str = "port") -> int:
    """The port, once it is known that it can be had; for 0 one that is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            message = f"--{flag}: cannot listen on 127.0.0.1:{port}: {error.strerror}"
            raise InvalidInput(message, field=flag) from error
        return int(probe.getsockname()[1])


def _plan(
    models: Sequence[ServedModel],
    replicas: Mapping[str, int],
    args: argparse.Namespace,
    endpoint: str,
    scaler: str | None,
    redis_words: Sequence[str],
    directory: Path,
) -> Plan:
    references = {model.name: f"{model.name}={model.checkpoint.path.resolve()}" for model in models}
    served = [word for reference in references.values() for word in ("--model", reference)]
    coordinator = ("serve", _COORDINATOR, *served, "--listen", endpoint, *redis_words)
    if scaler is not None:
        coordinator += ("--scaler-listen", scaler)
    options = (*redis_words, *(("--dtype", args.dtype) if args.dtype else ()))
    degrees = tuple(word for axis, degree in _degrees(args).items() for word in (f"--{axis}", str(degree)))
    workers: dict[tuple[str, str], tuple[Program, ...]] = {}
    count = 0
    for model in models:
        for spec in model.services:
            programs = []
            for number in range(replicas.get(spec.service, 1)):
                name = f"{spec.service}-{number}" if len(models) == 1 else f"{model.name}/{spec.service}-{number}"
                listen = f"unix:{directory}/{count}.sock"
                model_options = ("--model", references[model.name], "--listen", listen, *options)
                if spec.service == "denoising":
                    model_options += degrees
                programs.append(Program(name, ("serve", spec.service, *model_options)))
                count += 1
            workers[model.name, spec.service] = tuple(programs)
    return Plan(endpoint, Program(_COORDINATOR, coordinator), workers)


async def _run(plan: Plan, store: EmbeddedStore | None, access: Access) -> int:
    supervisor = Supervisor(_note)
    code = SUCCESS
    try:
        async with asyncio.TaskGroup() as group:
            for program in plan.programs:
                group.create_task(supervisor.keep(program))
            group.create_task(_announce_ready(plan, supervisor, access))
            if store:
                group.create_task(_watch_store(store))
    except* FleetError as failures:
        for failure in failures.exceptions:
            _note(f"fleet up: {failure}")
            bad_input = isinstance(failure, ServiceEnded) and failure.code == BAD_INPUT
            code = BAD_INPUT if bad_input else FAILED
    finally:
        _note("stopping")
        await supervisor.stop([_COORDINATOR])  # first, as it finishes what is under way with the workers' help
        await supervisor.stop([program.name for program in plan.programs])
    return code


async def _announce_ready(plan: Plan, supervisor: Supervisor, access: Access) -> None:
    """Wait until every worker has announced itself to the coordinator."""
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
                supervisor.ready = all(alive.get(key, 0) >= len(programs) for key, programs in plan.workers.items())
    names = ", ".join(dict.fromkeys(model for model, _ in plan.workers))
    sys.stdout.write(f"ready: {plan.endpoint} serves {names} ({time.monotonic() - began:.1f} s)\n")
    sys.stdout.flush()


async def _watch_store(store: EmbeddedStore) -> None:
    while store.is_running():  # noqa: ASYNC110 -- another process, which tells nobody
        await asyncio.sleep(_POLL_SECONDS * 5)
    raise Unavailable("the embedded store ended")


def _note(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
