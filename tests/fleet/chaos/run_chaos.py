"""Torments a fleet of real processes while clients use it.

    python tests/fleet/chaos/run_chaos.py --requests 1000 --seed 1
    python tests/fleet/chaos/run_chaos.py --churn --requests 1000 --poison 3

Several coordinators, and several workers for each stage of a Flux and a Wan checkpoint, on a real Redis that writes to
its disk before it answers. Processes are killed, stopped, told to leave and cut off; Redis is killed and started again;
clients do not read, send twice, cancel, leave; peers speak nonsense; and every process has a wrong clock. At the end
every accepted request has ended once, every result has the bytes that one process makes, and nothing is left over.

With --churn it is two coordinators, two denoisers and one worker of each other stage of the Flux checkpoint, with all
settings at their defaults, and each process is killed every 8 seconds on average. Requests that kill their workers must
be FAILED, and no other may be.

Ends with 1 and tells all that is needed to look into it, if anything did not hold. The same seed draws the same
requests and faults; how they meet depends on the machine.
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
from chaos_clients import Channels, Client, Pulse, Stub, Wrong, download  # noqa: E402
from chaos_faults import Chaos  # noqa: E402
from chaos_plan import CALLERS, CAUSAL, FLUX, WAN, Manner, Picture, Plan, make_churn_plan, make_plan  # noqa: E402
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
_ON_CPU = ("--device", "cpu", "--threads", "1")  # where and how it computes; all else is at its defaults
_SILENT_SECONDS = 60.0  # after which a run without any event is given up

References = Mapping[Picture, Sequence[bytes]]


def build_models(directory: Path, plan: Plan) -> dict[str, Path]:
    """The checkpoints that are served, by name."""
    build = {FLUX: build_tiny_flux, WAN: build_tiny_wan, CAUSAL: build_tiny_wan_causal}
    return {name: build[name](directory / name) for name in dict.fromkeys(each.model for each in plan.pictures)}


def make_references(models: Mapping[str, Path], pictures: Sequence[Picture]) -> References:
    """What each picture's files are, computed in this process by the same stages, with as many threads as there."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    references: dict[Picture, Sequence[bytes]] = {}
    for name, path in models.items():
        local = open_fleet(f"{name}={path}")
        for picture in (each for each in pictures if each.model == name):
            references[picture] = [item.data.numpy().tobytes() for item in local.media(**picture.given).items]
        local.close()
    torch.set_num_threads(threads)
    return references


class Run:
    """One run: a fleet, its clients, and the chaos."""

    def __init__(self, plan: Plan, fleet: Fleet, redis: Redis, references: References) -> None:
        self._plan = plan
        self._fleet = fleet
        self._redis = redis
        self._references = references
        self._channels = Channels()
        self._pulse = Pulse()
        self._clients = [Client(order, fleet, self._channels, self._pulse, plan.seed) for order in plan.orders]
        self._chaos = Chaos(fleet, redis, self._clients, self._channels)
        self._churn = Churn(plan, fleet, self._chaos, self._clients)
        self._baseline = Baseline()
        self._findings: list[str] = []
        self._stored: dict[str, Stored] = {}
        self._warmed: list[str] = []

    async def run(self) -> Report:
        """Start, torment, check, stop."""
        began = time.monotonic()
        try:
            await self._fleet.start()
            await self._warm_up()
            striking = asyncio.create_task(self._strike())
            await self._serve_orders()
            await self._end_faults(striking)
            await self._check()
        finally:
            await self._chaos.stop()
            await self._channels.close()
        await self._fleet.stop()
        self._findings += self._fleet.findings + self._chaos.peers.findings + check_logs(self._fleet.logs)
        outcomes = [client.outcome for client in self._clients]
        seconds = time.monotonic() - began
        details = self._details() if self._findings else ()
        return Report(self._plan, seconds, outcomes, self._stored, self._chaos.strikes, self._findings, details)

    async def _strike(self) -> None:
        await asyncio.gather(self._chaos.run(self._plan.faults, self._pulse), self._churn.run(self._pulse))

    async def _warm_up(self) -> None:
        """Wait for all workers, and let every coordinator and every stage serve once."""
        coordinators = self._fleet.of(coordinators=True)
        await asyncio.gather(*(self._warm(self._channels.stub(each.target)) for each in coordinators))
        self._baseline.measure(self._fleet)

    async def _warm(self, stub: Stub) -> None:
        key = credentials(CALLERS[0])

        async def sees_everybody() -> bool:
            reply = await stub.ListModels(pb.ListModelsRequest(), wait_for_ready=True, metadata=key)
            wanted = self._fleet.workers
            return all(each.workers == wanted[each.service] for model in reply.models for each in model.services)

        await wait_until(sees_everybody)
        for picture in {each.model: each for each in self._plan.pictures}.values():
            request = pb.SubmitRequest(model=picture.model, parameters=picture.parameters)
            accepted = await stub.Submit(request, metadata=key)
            self._warmed.append(accepted.request.request_id)
            watch = stub.Watch(pb.WatchRequest(request_id=self._warmed[-1]), metadata=key)
            last = [reply.event async for reply in watch][-1]
            assert last.state_change.state == pb.REQUEST_STATE_SUCCEEDED, last

    async def _serve_orders(self) -> None:
        """So many clients at a time, each with its orders one after the other."""
        waiting = list(reversed(self._clients))

        async def work() -> None:
            while waiting:
                client = waiting.pop()
                try:
                    await client.run()
                except Wrong as wrong:
                    self._findings.append(str(wrong))
                self._pulse.order()

        workers = [asyncio.create_task(work()) for _ in range(self._plan.clients)]
        while not all(worker.done() for worker in workers):
            await asyncio.wait(workers, timeout=1)
            if time.monotonic() - self._pulse.beaten > _SILENT_SECONDS:
                self._findings.append(f"nothing has happened for {_SILENT_SECONDS:g} s: {self._unfinished()}")
                break
        for worker in workers:
            worker.cancel()
        for failure in await asyncio.gather(*workers, return_exceptions=True):
            if isinstance(failure, Exception):
                raise failure

    def _unfinished(self) -> str:
        outcomes = [client.outcome for client in self._clients]
        open_ones = [each for each in outcomes if each.heard and each.heard[-1].state_change.state < 3]
        return ", ".join(f"order {each.order.number} is request {each.request_id}" for each in open_ones)

    async def _end_faults(self, striking: asyncio.Task[None]) -> None:
        """Let what still lasts come to its end, heal everything, and wait for the fleet to be whole."""
        async with asyncio.timeout(self._plan.longest_seconds + _SILENT_SECONDS):
            self._pulse.end()
            await striking
            await self._chaos.stop()
            self._fleet.heal()
            await wait_until(self._fleet.is_complete)

    async def _check(self) -> None:
        outcomes = [client.outcome for client in self._clients]
        await self._channels.close()
        gc.collect()  # calls that broke off live on in the tracebacks of their errors, and keep their connections
        self._findings += await settled(self._fleet, self._redis, self._baseline)
        self._stored = await read_store(self._redis)
        self._findings += check_requests(self._stored, outcomes, self._warmed)
        heard = {outcome.request_id: outcome.files for outcome in outcomes if outcome.files}
        stub = self._channels.stub(self._fleet.of(coordinators=True)[0].target)
        for name, each in self._stored.items():
            if each.record.state == pb.REQUEST_STATE_SUCCEEDED:
                try:
                    files = await download(stub, each.record.caller, name)
                except grpc.aio.AioRpcError as error:
                    self._findings.append(f"the result of request {name} cannot be had: {error.details()}")
                    continue
                self._findings += check_files(name, each.record, files, self._references)
                if heard.get(name, files) != files:
                    self._findings.append(f"the client of request {name} got other bytes than are stored")

    def _details(self) -> list[str]:
        """What tells how it came to the findings."""
        text = "\n".join(self._findings)
        names = [name for name in self._stored if name in text]
        streams = [f"{name}: {event}".replace("\n", " ") for name in names for event in self._stored[name].events]
        schedule = [str(fault) for fault in self._plan.faults]
        lines = lines_about(self._fleet, names)
        return ["schedule:", *schedule, "what happened:", *self._fleet.story, "events:", *streams, "logs:", *lines]


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
        coordinator_words=(),
        worker_words=lambda _: _ON_CPU,
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
        report.findings = [*report.findings, f"processes are left over: {left}"]
    return report


def run_chaos(plan: Plan, directory: Path) -> Report:
    """Run a plan; the logs of its processes go to `directory`, whose path must be short enough for unix sockets."""
    models = build_models(directory / "models", plan)
    return asyncio.run(_run(plan, models, make_references(models, plan.pictures), directory))


def explain(report: Report, directory: Path) -> str:
    """The findings, and all that helps to find their cause."""
    again = f"--requests {len(report.plan.orders)} --seed {report.plan.seed}"
    if report.plan.is_churn:
        poison = sum(order.manner is Manner.POISON for order in report.plan.orders)
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
    """Run once, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--requests", type=int, default=60, help="pictures that the clients want (default: 60)")
    parser.add_argument("--seed", type=int, help="of requests and faults (default: another one each time)")
    parser.add_argument("--clients", type=int, default=6, help="clients at a time (default: 6)")
    parser.add_argument("--faults", type=int, help="how many strike (default: one for two requests, 19 at least)")
    parser.add_argument("--longest-seconds", type=float, default=3.0, help="that a fault lasts (default: 3)")
    churn = parser.add_argument_group(
        "churn", "a small fleet at its default settings, whose processes die all the time"
    )
    churn.add_argument("--churn", action="store_true", help="this in place of faults of all kinds")
    churn.add_argument(
        "--death-seconds", type=float, default=8.0, help="mean life of a process (default: 8; 0: no end)"
    )
    churn.add_argument("--poison", type=int, default=0, help="requests that kill their workers (default: none)")
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
