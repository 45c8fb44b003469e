"""Injects faults into a fleet of real processes while clients use it.

    python tests/fleet/chaos/run_chaos.py --requests 1000 --seed 1
    python tests/fleet/chaos/run_chaos.py --churn --requests 1000 --poison 3

The fleet has several coordinators, and several workers for each stage of a Flux and a Wan checkpoint; Redis syncs every
write. Processes are killed, stopped, terminated and partitioned; Redis is killed and restarted; clients do not read,
submit twice, cancel and disconnect; peers send malformed data; and every process has a skewed clock. At the end, every
accepted request must have ended once, every result must have the bytes of a single process, and no resources may be
left.

With --churn, the fleet has two coordinators, two denoisers and one worker of each other stage of the Flux checkpoint,
with default settings, and each process is killed every 8 seconds on average. Exactly the requests that kill their
workers must be FAILED.

The exit status is 1 if a check failed; the output then has all details for an analysis. The seed determines requests
and faults, but not their timing, which depends on the host.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "proto"), str(Path(__file__).parent)]

import grpc  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from chaos_checks import (  # noqa: E402
    Baseline,
    Stored,
    check_files,
    check_logs,
    check_requests,
    lines_about,
    read_store,
    settled,
)
from chaos_churn import Churn  # noqa: E402
from chaos_clients import Channels, Client, RunProgress, Stub, UnexpectedReply, download  # noqa: E402
from chaos_faults import Chaos  # noqa: E402
from chaos_plan import CALLERS, CAUSAL, FLUX, WAN, Behaviour, MediaRequest, Plan, make_churn_plan, make_plan  # noqa: E402
from chaos_processes import Fleet, credentials  # noqa: E402
from chaos_report import Report  # noqa: E402
from redis.asyncio import Redis  # noqa: E402

from async_tests import wait_until  # noqa: E402
from common.state.connection import connect  # noqa: E402
from fleet.v1 import generation_pb2 as pb  # noqa: E402
from local_fleet import open_fleet  # noqa: E402
from tiny_flux import build_tiny_flux  # noqa: E402
from tiny_wan import build_tiny_wan, build_tiny_wan_causal  # noqa: E402

COORDINATORS, WORKERS = 3, 2
CHURN_COORDINATORS, CHURN_WORKERS, CHURN_DENOISERS = 2, 1, 2
_ON_CPU = ("--device", "cpu", "--threads", "1")  # device and threads; all other settings are defaults
_SILENT_SECONDS = 60.0  # timeout of a run without any event

References = Mapping[MediaRequest, Sequence[bytes]]


def build_models(directory: Path, plan: Plan) -> dict[str, Path]:
    """Build the checkpoints, by model name."""
    build = {FLUX: build_tiny_flux, WAN: build_tiny_wan, CAUSAL: build_tiny_wan_causal}
    return {name: build[name](directory / name) for name in dict.fromkeys(each.model for each in plan.media_requests)}


def make_references(models: Mapping[str, Path], media_requests: Sequence[MediaRequest]) -> References:
    """Generate the files of each request in this process, with the same stages and number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    references: dict[MediaRequest, Sequence[bytes]] = {}
    for name, path in models.items():
        local = open_fleet(f"{name}={path}")
        for media_request in (each for each in media_requests if each.model == name):
            references[media_request] = [
                item.data.numpy().tobytes() for item in local.media(**media_request.given).items
            ]
        local.close()
    torch.set_num_threads(threads)
    return references


class Run:
    """A run: a fleet, its clients, and fault injection."""

    def __init__(self, plan: Plan, fleet: Fleet, redis: Redis, references: References) -> None:
        self._plan = plan
        self._fleet = fleet
        self._redis = redis
        self._references = references
        self._channels = Channels()
        self._run_progress = RunProgress()
        self._clients = [Client(order, fleet, self._channels, self._run_progress, plan.seed) for order in plan.orders]
        self._chaos = Chaos(fleet, redis, self._clients, self._channels)
        self._churn = Churn(plan, fleet, self._chaos, self._clients)
        self._baseline = Baseline()
        self._findings: list[str] = []
        self._stored: dict[str, Stored] = {}
        self._warmed: list[str] = []

    async def run(self) -> Report:
        """Start the fleet, inject faults, check, and stop."""
        began = time.monotonic()
        try:
            await self._fleet.start()
            await self._warm_up()
            injecting = asyncio.create_task(self._inject_faults())
            await self._serve_orders()
            await self._end_faults(injecting)
            await self._check()
        finally:
            await self._chaos.stop()
            await self._channels.close()
        await self._fleet.stop()
        self._findings += self._fleet.findings + self._chaos.peers.findings + check_logs(self._fleet.logs)
        outcomes = [client.outcome for client in self._clients]
        seconds = time.monotonic() - began
        details = self._details() if self._findings else ()
        return Report(self._plan, seconds, outcomes, self._stored, self._chaos.injected, self._findings, details)

    async def _inject_faults(self) -> None:
        await asyncio.gather(
            self._chaos.run(self._plan.faults, self._run_progress), self._churn.run(self._run_progress)
        )

    async def _warm_up(self) -> None:
        """Wait for all workers, and run one request on every coordinator and stage."""
        coordinators = self._fleet.of(coordinators=True)
        await asyncio.gather(*(self._warm(self._channels.stub(each.target)) for each in coordinators))
        self._baseline.measure(self._fleet)

    async def _warm(self, stub: Stub) -> None:
        key = credentials(CALLERS[0])

        async def lists_all_workers() -> bool:
            reply = await stub.ListModels(pb.ListModelsRequest(), wait_for_ready=True, metadata=key)
            wanted = self._fleet.workers
            return all(each.workers == wanted[each.service] for model in reply.models for each in model.services)

        await wait_until(lists_all_workers)
        for media_request in {each.model: each for each in self._plan.media_requests}.values():
            request = pb.SubmitRequest(model=media_request.model, parameters=media_request.parameters)
            accepted = await stub.Submit(request, metadata=key)
            self._warmed.append(accepted.request.request_id)
            watch = stub.Watch(pb.WatchRequest(request_id=self._warmed[-1]), metadata=key)
            last = [reply.event async for reply in watch][-1]
            assert last.state_change.state == pb.REQUEST_STATE_SUCCEEDED, last

    async def _serve_orders(self) -> None:
        """Run all orders with `clients` concurrent clients."""
        waiting = list(reversed(self._clients))

        async def work() -> None:
            while waiting:
                client = waiting.pop()
                try:
                    await client.run()
                except UnexpectedReply as error:
                    self._findings.append(str(error))
                self._run_progress.order()

        workers = [asyncio.create_task(work()) for _ in range(self._plan.clients)]
        while not all(worker.done() for worker in workers):
            await asyncio.wait(workers, timeout=1)
            if time.monotonic() - self._run_progress.last_moved > _SILENT_SECONDS:
                self._findings.append(f"no event for {_SILENT_SECONDS:g} s: {self._unfinished()}")
                break
        for worker in workers:
            worker.cancel()
        for failure in await asyncio.gather(*workers, return_exceptions=True):
            if isinstance(failure, Exception):
                raise failure

    def _unfinished(self) -> str:
        outcomes = [client.outcome for client in self._clients]
        open_ones = [each for each in outcomes if each.received and each.received[-1].state_change.state < 3]
        return ", ".join(f"order {each.order.number} is request {each.request_id}" for each in open_ones)

    async def _end_faults(self, injecting: asyncio.Task[None]) -> None:
        """Wait for lasting faults, heal the fleet, and wait until it is complete."""
        async with asyncio.timeout(self._plan.longest_seconds + _SILENT_SECONDS):
            self._run_progress.end()
            await injecting
            await self._chaos.stop()
            self._fleet.heal()
            await wait_until(self._fleet.is_complete)

    async def _check(self) -> None:
        outcomes = [client.outcome for client in self._clients]
        await self._channels.close()
        gc.collect()  # tracebacks of failed calls reference them and keep their connections open
        self._findings += await settled(self._fleet, self._redis, self._baseline)
        self._stored = await read_store(self._redis)
        self._findings += check_requests(self._stored, outcomes, self._warmed)
        received = {outcome.request_id: outcome.files for outcome in outcomes if outcome.files}
        stub = self._channels.stub(self._fleet.of(coordinators=True)[0].target)
        for name, each in self._stored.items():
            if each.record.state == pb.REQUEST_STATE_SUCCEEDED:
                try:
                    files = await download(stub, each.record.caller, name)
                except grpc.aio.AioRpcError as error:
                    self._findings.append(f"the result of request {name} cannot be downloaded: {error.details()}")
                    continue
                self._findings += check_files(name, each.record, files, self._references)
                if received.get(name, files) != files:
                    self._findings.append(f"the client of request {name} received other bytes than the stored ones")

    def _details(self) -> list[str]:
        """Details for the analysis of findings."""
        text = "\n".join(self._findings)
        names = [name for name in self._stored if name in text]
        streams = [f"{name}: {event}".replace("\n", " ") for name in names for event in self._stored[name].events]
        schedule = [str(fault) for fault in self._plan.faults]
        lines = lines_about(self._fleet, names)
        return ["schedule:", *schedule, "history:", *self._fleet.history, "events:", *streams, "logs:", *lines]


def _fleet_of(plan: Plan, models: Mapping[str, Path], directory: Path) -> Fleet:
    if not plan.is_churn:
        return Fleet(directory, models, plan.skews(), coordinators=COORDINATORS, workers=WORKERS, callers=CALLERS)
    return Fleet(
        directory,
        models,
        plan.skews(),
        coordinators=CHURN_COORDINATORS,
        workers=CHURN_WORKERS,
        denoisers=CHURN_DENOISERS,
        callers=CALLERS,
        coordinator_flags=(),
        worker_flags=lambda _: _ON_CPU,
    )


async def _run(plan: Plan, models: Mapping[str, Path], references: References, directory: Path) -> Report:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    fleet = _fleet_of(plan, models, directory)
    try:
        async with connect(fleet.server.url) as redis:
            report = await Run(plan, fleet, redis, references).run()
    finally:
        await fleet.close()
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    if left:
        report.findings = [*report.findings, f"processes still run: {left}"]
    return report


def run_chaos(plan: Plan, directory: Path) -> Report:
    """Run a plan; the logs of its processes go to `directory`, whose path must be short enough for unix sockets."""
    models = build_models(directory / "models", plan)
    return asyncio.run(_run(plan, models, make_references(models, plan.media_requests), directory))


def explain(report: Report, directory: Path) -> str:
    """Format the findings and the details of their causes."""
    again = f"--requests {len(report.plan.orders)} --seed {report.plan.seed}"
    if report.plan.is_churn:
        poison = sum(order.behaviour is Behaviour.POISON for order in report.plan.orders)
        again += f" --churn --death-seconds {report.plan.death_seconds:g} --poison {poison}"
    lines = [*report.details, f"findings of {again} (logs are in {directory}):", *report.findings]
    return "\n".join(lines)


def _plan_of(args: argparse.Namespace) -> Plan:
    seed = secrets.randbits(32) if args.seed is None else args.seed
    if args.churn:
        return make_churn_plan(
            seed,
            args.requests,
            clients=args.clients,
            death_seconds=args.death_seconds,
            longest_seconds=args.longest_seconds,
            poison=args.poison,
        )
    faults = args.requests // 2 if args.faults is None else args.faults
    return make_plan(seed, args.requests, clients=args.clients, faults=faults, longest_seconds=args.longest_seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Run once and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--requests", type=int, default=60, help="number of requests (default: 60)")
    parser.add_argument("--seed", type=int, help="seed of requests and faults (default: random)")
    parser.add_argument("--clients", type=int, default=6, help="concurrent clients (default: 6)")
    parser.add_argument("--faults", type=int, help="number of faults (default: one per two requests, at least 19)")
    parser.add_argument("--longest-seconds", type=float, default=3.0, help="longest duration of a fault (default: 3)")
    churn = parser.add_argument_group(
        "churn", "a small fleet with default settings, whose processes are killed continuously"
    )
    churn.add_argument(
        "--churn", action="store_true", help="kill processes continuously instead of injecting faults of all kinds"
    )
    churn.add_argument(
        "--death-seconds", type=float, default=8.0, help="mean lifetime of a process (default: 8; 0: unlimited)"
    )
    churn.add_argument("--poison", type=int, default=0, help="number of requests that kill their workers (default: 0)")
    args = parser.parse_args(argv)
    plan = _plan_of(args)
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    sys.stdout.write(f"seed {plan.seed}\n")
    report = run_chaos(plan, directory)
    sys.stdout.write(f"{report.table()}\n")
    if report.findings:
        sys.stdout.write(f"{explain(report, directory)}\n")
        return 1
    shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
