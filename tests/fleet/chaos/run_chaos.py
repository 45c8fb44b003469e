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
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "proto"), str(Path(__file__).parent)]

import psutil  # noqa: E402
from chaos_checks import Baseline, check_logs  # noqa: E402
from chaos_churn import Churn  # noqa: E402
from chaos_faults import Chaos  # noqa: E402
from chaos_plan import CALLERS, Manner, Plan, make_churn_plan, make_plan  # noqa: E402
from chaos_processes import Fleet  # noqa: E402
from chaos_report import Report  # noqa: E402
from chaos_run import SILENT_SECONDS, FleetRun, References, build_models, make_references  # noqa: E402
from redis.asyncio import Redis  # noqa: E402

from common.state.connection import connect  # noqa: E402
from redis_servers import until  # noqa: E402

COORDINATORS, WORKERS = 3, 2
CHURN_COORDINATORS, CHURN_WORKERS, CHURN_DENOISERS = 2, 1, 2
_ON_CPU = ("--device", "cpu", "--threads", "1")  # where and how it computes; all else is at its defaults


class Run(FleetRun):
    """One run: a fleet, its clients, and the chaos."""

    def __init__(self, plan: Plan, fleet: Fleet, redis: Redis, references: References) -> None:
        super().__init__(plan, fleet, redis, references)
        self.clients += [self.new_client(order) for order in plan.orders]
        self._chaos = Chaos(fleet, redis, self.clients, self.channels)
        self._churn = Churn(plan, fleet, self._chaos, self.clients)
        self._baseline = Baseline()

    async def run(self) -> Report:
        """Start, torment, check, stop."""
        began = time.monotonic()
        try:
            await self.fleet.start()
            await self.warm_up()
            self._baseline.measure(self.fleet)
            striking = asyncio.create_task(self._strike())
            await self.serve(iter(self.clients))
            await self._end_faults(striking)
            await self.check(self._baseline)
        finally:
            await self._chaos.stop()
            await self.channels.close()
        await self.fleet.stop()
        self.findings += self.fleet.findings + self._chaos.peers.findings + check_logs(self.fleet.logs)
        outcomes = [client.outcome for client in self.clients]
        seconds = time.monotonic() - began
        details = self._details() if self.findings else ()
        return Report(self.plan, seconds, outcomes, self.stored, self._chaos.strikes, self.findings, details)

    async def _strike(self) -> None:
        await asyncio.gather(self._chaos.run(self.plan.faults, self.pulse), self._churn.run(self.pulse))

    async def _end_faults(self, striking: asyncio.Task[None]) -> None:
        """Let what still lasts come to its end, heal everything, and wait for the fleet to be whole."""
        async with asyncio.timeout(self.plan.longest_seconds + SILENT_SECONDS):
            self.pulse.end()
            await striking
            await self._chaos.stop()
            self.fleet.heal()
            await until(self.fleet.is_complete)

    def _details(self) -> list[str]:
        """What tells how it came to the findings."""
        return ["schedule:", *map(str, self.plan.faults), *self.details()]


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
