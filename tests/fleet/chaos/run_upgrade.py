"""Rolling update and rollback under load: replaces a fleet of the latest release by this source tree.

    python tests/fleet/chaos/run_upgrade.py

The fleet has two coordinators, and workers of each service of a Flux checkpoint and of a causal Wan checkpoint, whose
result is streamed. All processes first run the release. Each pass stops every process with SIGTERM and starts the other
version in its place: workers first, coordinators first, or interleaved. Every second pass is a rollback. At the end
every accepted request has succeeded once, its client has received each event once, and its files have the bytes of a
single process.

The exit status is 1 if a check failed; findings are printed. The release's source is read from tests/golden, without
git history.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TESTS), str(TESTS.parent), str(TESTS.parent / "proto"), str(Path(__file__).parent)]

import psutil  # noqa: E402
from chaos_checks import check_logs  # noqa: E402
from chaos_clients import Client  # noqa: E402
from chaos_command import end_run, explain_findings, new_parser  # noqa: E402
from chaos_plan import CALLERS, CAUSAL, FLUX, INNOCENT, MEDIA_REQUESTS, Plan, make_order  # noqa: E402
from chaos_processes import COORDINATOR, Fleet, Process  # noqa: E402
from chaos_run import FleetRun, References, build_models, make_references  # noqa: E402
from redis.asyncio import Redis  # noqa: E402
from warm_starter import TREE  # noqa: E402

from async_tests import wait_until  # noqa: E402
from common.state.connection import command, connect  # noqa: E402
from release import VERSION, unpack_release  # noqa: E402

COORDINATORS, WORKERS, DENOISERS = 2, 1, 2
_MODELS = (FLUX, CAUSAL)


class ReplacementOrder(Enum):
    """Order in which a pass replaces processes."""

    WORKERS_FIRST = "workers first"
    COORDINATORS_FIRST = "coordinators first"
    INTERLEAVED = "interleaved"

    def of(self, processes: Sequence[Process], rng: random.Random) -> list[Process]:
        """The processes in this order. Workers are shuffled."""
        coordinators = [each for each in processes if each.role == COORDINATOR]
        workers = [each for each in processes if each.role != COORDINATOR]
        rng.shuffle(workers)
        match self:
            case ReplacementOrder.WORKERS_FIRST:
                return workers + coordinators
            case ReplacementOrder.COORDINATORS_FIRST:
                return coordinators + workers
            case ReplacementOrder.INTERLEAVED:
                half = len(workers) // len(coordinators)
                return [*workers[:half], coordinators[0], *workers[half:], *coordinators[1:]]


PASSES = (ReplacementOrder.WORKERS_FIRST, ReplacementOrder.INTERLEAVED, ReplacementOrder.COORDINATORS_FIRST)
"""Counted from 0, even passes upgrade and odd passes roll back; two rounds run each order in both directions."""


@dataclass
class Summary:
    """Result of a run. `replaced` counts processes that ended while requests were open."""

    passes: Sequence[str]
    replaced: int
    succeeded: int
    seconds: float
    findings: Sequence[str]
    details: Sequence[str]

    def line(self) -> str:
        """The figures in one line."""
        return (
            f"v{VERSION} and the present code: {self.replaced} processes replaced under load in {len(self.passes)} "
            f"passes ({', '.join(self.passes)}); {self.succeeded} requests succeeded with the expected bytes, "
            f"{len(self.findings)} findings, {self.seconds:.0f} s"
        )


class Upgrade(FleetRun):
    """A run. Its clients send requests until the last pass ends."""

    # A release deletes only the fields that it knows; the fields of a newer release expire with the record.
    permitted_fields = ("ticket:",)

    def __init__(self, plan: Plan, fleet: Fleet, redis: Redis, references: References, trees: Sequence[Path]) -> None:
        super().__init__(plan, fleet, redis, references)
        self._rng = random.Random(plan.seed)
        self._trees = trees
        self._replaced = 0
        self._is_over = False

    async def run(self, passes: Sequence[ReplacementOrder]) -> Summary:
        """Start the release, replace it and roll back under load, check, stop."""
        began = time.monotonic()
        named: list[str] = []
        try:
            await self.fleet.start()
            await self.warm_up()
            load = asyncio.create_task(self.serve(self._orders()))
            try:
                for number, replacement_order in enumerate(passes):
                    tree = self._trees[(number + 1) % 2]
                    named.append(f"{'rollback' if number % 2 else 'upgrade'}, {replacement_order.value}")
                    await self._replace_all(replacement_order, tree)
            finally:
                self._is_over = True
                await load
            await self.check()
        finally:
            await self.channels.close()
        await self.fleet.stop()
        self.findings += self.fleet.findings + check_logs(self.fleet.logs)
        succeeded = sum(bool(client.outcome.files) for client in self.clients)
        details = self.details() if self.findings else ()
        return Summary(named, self._replaced, succeeded, time.monotonic() - began, self.findings, details)

    def _orders(self) -> Iterator[Client]:
        for number in itertools.count():
            if self._is_over:
                return
            self.clients.append(self.new_client(make_order(number, self._rng, self.plan.media_requests, INNOCENT)))
            yield self.clients[-1]

    async def _replace_all(self, replacement_order: ReplacementOrder, tree: Path) -> None:
        """Replace every process in turn, each while requests are open."""
        for process in replacement_order.of(list(self.fleet.living), self._rng):
            await self.run_progress.reach(0, 1)
            await wait_until(self._is_loaded)
            await self.fleet.replace(process, tree)
            self._replaced += 1
            stub = self.channels.stub(self.fleet.of(coordinators=True)[-1].target)
            await self.wait_for_all_workers(stub)
        for process in self.fleet.living:
            program = psutil.Process(process.pid).cmdline()[1]
            if not Path(program).is_relative_to(tree):
                self.findings.append(f"{process.name} runs {program}, not {tree}")

    async def _is_loaded(self) -> bool:
        """Whether requests are open."""
        return any([await command(self.redis, "SCARD", f"fleet:open:{model}") for model in self.fleet.models])


async def _run(
    plan: Plan, models: Mapping[str, Path], references: References, directory: Path, passes: Sequence[ReplacementOrder]
) -> Summary:
    trees = (unpack_release(directory / "release"), TREE)
    fleet = Fleet(
        directory,
        models,
        plan.skews(),
        coordinators=COORDINATORS,
        workers=WORKERS,
        denoisers=DENOISERS,
        callers=CALLERS,
        trees=trees,
    )
    try:
        async with connect(fleet.server.url) as redis:
            return await Upgrade(plan, fleet, redis, references, trees).run(passes)
    finally:
        await fleet.close()


def run_upgrade(seed: int, clients: int, passes: Sequence[ReplacementOrder], directory: Path) -> Summary:
    """Run passes. Processes log to `directory`, whose path must be short enough for Unix sockets."""
    media_requests = [each for each in MEDIA_REQUESTS if each.model in _MODELS]
    plan = Plan(seed, clients, (), (), 0.0, media_requests)
    models = build_models(directory / "models", plan)
    return asyncio.run(_run(plan, models, make_references(models, media_requests), directory, passes))


def main(argv: Sequence[str] | None = None) -> int:
    """Run once and print the summary."""
    parser = new_parser(__doc__)
    parser.add_argument("--seed", type=int, default=1, help="seed of requests and of the order of workers (default: 1)")
    parser.add_argument("--clients", type=int, default=4, help="concurrent clients (default: 4)")
    parser.add_argument("--passes", type=int, default=6, help="number of upgrades and rollbacks (default: 6)")
    args = parser.parse_args(argv)
    directory = Path(tempfile.mkdtemp(prefix="upgrade-"))
    passes = list(itertools.islice(itertools.cycle(PASSES), args.passes))
    summary = run_upgrade(args.seed, args.clients, passes, directory)
    findings = summary.findings
    explanation = explain_findings(summary.details, findings, directory) if findings else ""
    return end_run(summary.line(), explanation, directory)


if __name__ == "__main__":
    sys.exit(main())
