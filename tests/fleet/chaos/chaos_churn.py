"""Timed churn: kills every process of the fleet repeatedly, and kills the workers of poison requests."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence

from chaos_clients import Client, RunProgress
from chaos_faults import Chaos
from chaos_plan import Behavior, Fault, Kind, Plan
from chaos_processes import COORDINATOR, Fleet, Process, Role

from common.state.records import is_terminal

_KILLED_SHARE = 0.8
"""Fraction of SIGKILL faults; the others are SIGSTOP with a later SIGCONT."""
_POLL_SECONDS = 0.05
_BEGIN_SECONDS = 0.3
"""Seconds that a poison request computes before its worker is killed; long enough that the call has started."""


class Churn:
    """Kills processes at random times, drawn from the plan's seed, until the run is over."""

    def __init__(self, plan: Plan, fleet: Fleet, chaos: Chaos, clients: Sequence[Client]) -> None:
        self._plan = plan
        self._fleet = fleet
        self._chaos = chaos
        self._poison = [client for client in clients if client.outcome.order.behavior is Behavior.POISON]
        self._numbers = itertools.count(len(plan.faults))

    async def run(self, run_progress: RunProgress) -> None:
        """Inject faults until the run ends. Processes stopped at that time stay stopped until Fleet.heal()."""
        works = [self._kill_workers_of(client) for client in self._poison]
        if self._plan.death_seconds:
            works += [self._kill_repeatedly(role, number) for number, role in enumerate(self._fleet.roles)]
        tasks = [asyncio.create_task(work) for work in works]
        await run_progress.over()
        for task in tasks:
            task.cancel()
        for failure in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(failure, Exception):
                raise failure

    async def _kill_repeatedly(self, role: Role, number: int) -> None:
        """Kill a random process of a role every `death_seconds` on average.

        A fraction of the faults, 1 - _KILLED_SHARE, stops a process for a while instead of killing it.
        """
        rng = random.Random(f"deaths of {self._plan.seed}, {number}")
        while True:
            await asyncio.sleep(rng.expovariate(1 / (_KILLED_SHARE * self._plan.death_seconds)))
            is_kill, draw = rng.random() < _KILLED_SHARE, rng.random()
            seconds = rng.uniform(0.2, self._plan.longest_seconds)
            living = [each for each in self._fleet.living if each.role == role and not each.is_ending]
            if living:
                fault = Fault(next(self._numbers), _kind(role, is_kill=is_kill), 0, 0, seconds, draw)
                await self._chaos.inject(fault, living[int(draw * len(living))])

    async def _kill_workers_of(self, client: Client) -> None:
        """Kill each worker that denoises the client's request, after the denoising has started."""
        outcome = client.outcome
        while not is_terminal(outcome.state):
            await asyncio.sleep(_POLL_SECONDS)
            worker = await self._denoiser_of(outcome.request_id)
            if worker is None:
                continue
            await asyncio.sleep(_BEGIN_SECONDS)
            if await self._denoiser_of(outcome.request_id) is worker:
                await self._chaos.inject(Fault(next(self._numbers), Kind.KILL_DENOISER, 0, 0, 0.0, 0.0), worker)
                await worker.ended.wait()

    async def _denoiser_of(self, request_id: str) -> Process | None:
        running = await self._chaos.runs_by_worker() if request_id else {}
        for process in self._fleet.of(coordinators=False):
            if process.role.program == "denoising" and request_id in running.get(process.pid, ()):
                return process
        return None


def _kind(role: Role, *, is_kill: bool) -> Kind:
    if role == COORDINATOR:
        return Kind.KILL_COORDINATOR if is_kill else Kind.STOP_COORDINATOR
    if not is_kill:
        return Kind.STOP_WORKER
    return Kind.KILL_DENOISER if role.program == "denoising" else Kind.KILL_WORKER
