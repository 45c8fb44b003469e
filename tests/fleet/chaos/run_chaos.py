"""Injects faults into a fleet of real processes while clients use it.

    python tests/fleet/chaos/run_chaos.py --requests 1000 --seed 1
    python tests/fleet/chaos/run_chaos.py --churn --requests 1000 --poison 3

The fleet has several coordinators, and several workers for each stage of three checkpoints: Flux, Wan and causal Wan.
Redis runs with `appendfsync always`. Processes are killed, stopped, terminated and partitioned; Redis is killed and
restarted; clients submit twice, cancel, disconnect and leave replies unread; peers send malformed data; and every
process has a skewed clock. At the end, every accepted request must have ended once, every result must have the bytes of
a single process, and no resources may be left.

With --churn, the fleet has two coordinators, two denoisers and one worker of each other stage of the Flux checkpoint,
with default settings. By default, each process is killed every 8 seconds and stopped every 32 seconds on average.
Exactly the requests that kill their workers must be FAILED.

The exit status is 1 if a check failed; the output then has all details for an analysis. The seed determines requests
and faults, but not their timing, which depends on the host.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
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
from chaos_command import end_run, explain_findings, new_parser  # noqa: E402
from chaos_faults import Chaos  # noqa: E402
from chaos_plan import CALLERS, Behavior, Plan, make_churn_plan, make_plan  # noqa: E402
from chaos_processes import Fleet  # noqa: E402
from chaos_report import Report  # noqa: E402
from chaos_run import SILENT_SECONDS, FleetRun, References, build_models, make_references  # noqa: E402
from redis.asyncio import Redis  # noqa: E402

from async_tests import wait_until  # noqa: E402
from common.state.connection import connect  # noqa: E402

COORDINATORS, WORKERS = 3, 2
CHURN_COORDINATORS, CHURN_WORKERS, CHURN_DENOISERS = 2, 1, 2
_ON_CPU = ("--device", "cpu", "--threads", "1")  # device and threads; all other settings are defaults


class Run(FleetRun):
    """A run: a fleet, its clients, and fault injection."""

    def __init__(self, plan: Plan, fleet: Fleet, redis: Redis, references: References) -> None:
        super().__init__(plan, fleet, redis, references)
        self.clients += [self.new_client(order) for order in plan.orders]
        self._chaos = Chaos(fleet, redis, self.clients, self.channels)
        self._churn = Churn(plan, fleet, self._chaos, self.clients)
        self._baseline = Baseline()

    async def run(self) -> Report:
        """Start the fleet, inject faults, check, and stop."""
        began = time.monotonic()
        try:
            await self.fleet.start()
            await self.warm_up()
            self._baseline.measure(self.fleet)
            injecting = asyncio.create_task(self._inject_faults())
            await self.serve(iter(self.clients))
            await self._end_faults(injecting)
            await self.check(self._baseline)
        finally:
            await self._chaos.stop()
            await self.channels.close()
        await self.fleet.stop()
        self.findings += self.fleet.findings + self._chaos.peers.findings + check_logs(self.fleet.logs)
        outcomes = [client.outcome for client in self.clients]
        seconds = time.monotonic() - began
        details = self._details() if self.findings else ()
        return Report(self.plan, seconds, outcomes, self.stored, self._chaos.injected, self.findings, details)

    async def _inject_faults(self) -> None:
        await asyncio.gather(self._chaos.run(self.plan.faults, self.run_progress), self._churn.run(self.run_progress))

    async def _end_faults(self, injecting: asyncio.Task[None]) -> None:
        """Wait for lasting faults, heal the fleet, and wait until it is complete."""
        async with asyncio.timeout(self.plan.longest_seconds + SILENT_SECONDS):
            self.run_progress.end()
            await injecting
            await self._chaos.stop()
            self.fleet.heal()
            await wait_until(self.fleet.is_complete)

    def _details(self) -> list[str]:
        """Details for the analysis of findings."""
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
    """Run a plan. Processes log to `directory`, whose path must be short enough for Unix sockets."""
    models = build_models(directory / "models", plan)
    return asyncio.run(_run(plan, models, make_references(models, plan.media_requests), directory))


def explain(report: Report, directory: Path) -> str:
    """Format the findings and the details of their causes."""
    plan = report.plan
    flags = f"--requests {len(plan.orders)} --seed {plan.seed} --clients {plan.clients}"
    flags += f" --longest-seconds {plan.longest_seconds:g}"
    if plan.is_churn:
        poison = sum(order.behavior is Behavior.POISON for order in plan.orders)
        flags += f" --churn --death-seconds {plan.death_seconds:g} --poison {poison}"
    else:
        flags += f" --faults {len(plan.faults)}"
    return explain_findings(report.details, report.findings, directory, f"findings of {flags}")


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
    parser = new_parser(__doc__)
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
        "--death-seconds", type=float, default=8.0, help="mean seconds until a process is killed (default: 8; 0: never)"
    )
    churn.add_argument("--poison", type=int, default=0, help="number of requests that kill their workers (default: 0)")
    args = parser.parse_args(argv)
    plan = _plan_of(args)
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    sys.stdout.write(f"seed {plan.seed}\n")
    report = run_chaos(plan, directory)
    return end_run(report.table(), explain(report, directory) if report.findings else "", directory)


if __name__ == "__main__":
    sys.exit(main())
