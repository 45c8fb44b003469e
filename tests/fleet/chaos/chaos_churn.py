"""Deaths by the clock: every process of the fleet is killed again and again, and some requests kill their workers."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Sequence

from chaos_clients import Client, Pulse
from chaos_faults import Chaos
from chaos_plan import Fault, Kind, Manner, Plan
from chaos_processes import COORDINATOR, Fleet, Process, Role

from common.state.records import is_terminal

_KILLED_SHARE = 0.8
"""The part of the strikes that are SIGKILLs; the others are SIGSTOPs, each with a SIGCONT some time later."""
_LOOK_SECONDS = 0.05
_BEGIN_SECONDS = 0.3
"""How long a poison request computes before its worker dies: a part of its loop, so that the call has begun."""


class Churn:
    """Kills processes at random moments, drawn for each from the plan's seed, until the run is over."""

    def __init__(self, plan: Plan, fleet: Fleet, chaos: Chaos, clients: Sequence[Client]) -> None:
        self._plan = plan
        self._fleet = fleet
        self._chaos = chaos
        self._poison = [client for client in clients if client.outcome.order.manner is Manner.POISON]
        self._numbers = itertools.count(len(plan.faults))

    async def run(self, pulse: Pulse) -> None:
        """Strike until the pulse ends. What is stopped then stays so until the fleet is healed."""
        works = [self._kill_workers_of(client) for client in self._poison]
        if self._plan.death_seconds:
            works += [self._strike(role, number) for number, role in enumerate(self._fleet.roles)]
        tasks = [asyncio.create_task(work) for work in works]
        await pulse.over()
        for task in tasks:
            task.cancel()
        for failure in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(failure, Exception):
                raise failure

    async def _strike(self, role: Role, number: int) -> None:
        """One process of a role dies every `death_seconds` on average; which one of several is drawn."""
        rng = random.Random(f"deaths of {self._plan.seed}, {number}")
        while True:
            await asyncio.sleep(rng.expovariate(_KILLED_SHARE / self._plan.death_seconds))
            is_kill, draw = rng.random() < _KILLED_SHARE, rng.random()
            seconds = rng.uniform(0.2, self._plan.longest_seconds)
            living = [each for each in self._fleet.living if each.role == role and not each.is_ending]
            if living:
                fault = Fault(next(self._numbers), _kind(role, is_kill=is_kill), 0, 0, seconds, draw)
                await self._chaos.strike(fault, living[int(draw * len(living))])

    async def _kill_workers_of(self, client: Client) -> None:
        """Kill each worker that denoises a request, once it has begun."""
        outcome = client.outcome
        while not is_terminal(outcome.state):
            await asyncio.sleep(_LOOK_SECONDS)
            worker = await self._denoiser_of(outcome.request_id)
            if worker is None:
                continue
            await asyncio.sleep(_BEGIN_SECONDS)
            if await self._denoiser_of(outcome.request_id) is worker:
                await self._chaos.strike(Fault(next(self._numbers), Kind.KILL_DENOISER, 0, 0, 0.0, 0.0), worker)
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
