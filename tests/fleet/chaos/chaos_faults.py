"""Injects the faults of a plan at their positions in the run, and records their targets."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from chaos_clients import Channels, Client, RunProgress
from chaos_links import Link
from chaos_peers import Peers
from chaos_plan import Fault, Kind
from chaos_processes import Fleet, Process
from redis.asyncio import Redis

from async_tests import wait_until
from common.errors import Unavailable
from common.state.connection import command
from common.state.records import is_terminal

T = TypeVar("T")


@dataclass
class InjectedFault:
    """An injected fault: target process, requests that ran there, and time `at_ms` in ms since the epoch."""

    fault: Fault
    target: str
    requests: Sequence[str] = ()
    at_ms: float = field(default_factory=lambda: time.time() * 1_000)


class Chaos:
    """Injects faults into a fleet. `redis` is a client that bypasses the links."""

    def __init__(self, fleet: Fleet, redis: Redis, clients: Sequence[Client], channels: Channels) -> None:
        self.injected: list[InjectedFault] = []
        self.peers = Peers()
        self._fleet = fleet
        self._redis = redis
        self._clients = clients
        self._channels = channels
        self._store_lock = asyncio.Lock()
        self._lasting: list[asyncio.Task[None]] = []

    async def run(self, faults: Sequence[Fault], run_progress: RunProgress) -> None:
        """Inject all faults in order; a lasting fault overlaps with the next faults."""
        for fault in faults:
            await run_progress.reach(fault.after_orders, fault.after_events)
            self._lasting.append(asyncio.create_task(self._inject(fault)))
        await asyncio.gather(*self._lasting)

    async def stop(self) -> None:
        """Stop injecting faults, and disconnect malformed peers and slow readers."""
        for task in self._lasting:
            task.cancel()
        await asyncio.gather(*self._lasting, return_exceptions=True)
        await self.peers.close()

    async def _inject(self, fault: Fault) -> None:
        """Inject a fault as soon as there is a target, for its duration."""
        await wait_until(partial(self._try_inject, fault))

    async def _try_inject(self, fault: Fault) -> bool:
        """Try to inject a fault; returns False if there is no target at present."""
        match fault.kind:
            case Kind.KILL_DENOISER | Kind.KILL_WORKER | Kind.LEAVE_WORKER | Kind.STOP_WORKER | Kind.FREEZE_WORKER:
                return await self._inject_in_worker(fault)
            case Kind.KILL_COORDINATOR | Kind.LEAVE_COORDINATOR | Kind.STOP_COORDINATOR | Kind.FREEZE_COORDINATOR:
                return await self._inject_in_coordinator(fault)
            case Kind.KILL_BOTH:
                return await self._kill_both(fault)
            case Kind.RESTART_STORE:
                return await self._restart_store(fault)
            case Kind.HOLD_STORE | Kind.CUT_STORE | Kind.HOLD_WORKER | Kind.CUT_WORKER:
                return await self._partition(fault)
            case Kind.SLOW_WATCH | Kind.SLOW_DOWNLOAD:
                return self._read_slowly(fault)
            case Kind.MALFORMED_COORDINATOR | Kind.MALFORMED_WORKER:
                return await self._send_malformed(fault)

    def _note(self, fault: Fault, target: str, requests: Sequence[str] = ()) -> None:
        self.injected.append(InjectedFault(fault, target, requests))
        hit = f", which runs {', '.join(requests)}" if requests else ""
        self._fleet.note(f"{fault.kind.value} ({fault.number}): {target}{hit}")

    async def inject(self, fault: Fault, target: Process) -> None:
        """Inject a fault into this process, for its duration."""
        if target.access is None:
            await self._signal(fault, target, await self._runs_of(target))
        else:
            await self._signal(fault, target, (await self.runs_by_worker()).get(target.pid, ()))

    async def _inject_in_worker(self, fault: Fault) -> bool:
        running = await self.runs_by_worker()
        workers = self._fleet.of(coordinators=False)
        denoising = [each for each in workers if each.role.program == "denoising"]
        busy = [each for each in denoising if running.get(each.pid)]
        candidates = (busy or denoising) if fault.kind is Kind.KILL_DENOISER else workers
        target = _drawn(candidates, fault.draw)
        if target is None:
            return False
        await self._signal(fault, target, running.get(target.pid, ()))
        return True

    async def _inject_in_coordinator(self, fault: Fault) -> bool:
        target = _drawn(self._fleet.of(coordinators=True), fault.draw)
        if target is None:
            return False
        await self._signal(fault, target, await self._runs_of(target))
        return True

    async def _signal(self, fault: Fault, target: Process, requests: Sequence[str]) -> None:
        self._note(fault, target.name, requests)
        match fault.kind:
            case Kind.LEAVE_WORKER | Kind.LEAVE_COORDINATOR:
                self._fleet.signal(target, signal.SIGTERM)
            case Kind.STOP_WORKER | Kind.STOP_COORDINATOR | Kind.FREEZE_WORKER | Kind.FREEZE_COORDINATOR:
                self._fleet.signal(target, signal.SIGSTOP)
                await asyncio.sleep(fault.seconds)
                is_frozen = fault.kind in (Kind.FREEZE_WORKER, Kind.FREEZE_COORDINATOR)
                self._fleet.signal(target, signal.SIGKILL if is_frozen else signal.SIGCONT)
            case _:
                self._fleet.signal(target, signal.SIGKILL)

    async def _kill_both(self, fault: Fault) -> bool:
        """Kill a busy denoiser and the coordinator of its request at the same time.

        If no denoiser is busy, a random worker and a random coordinator are killed.
        """
        running = await self.runs_by_worker()
        by_pid = {each.pid: each for each in self._fleet.of(coordinators=False)}
        busy = [pid for pid in running if pid in by_pid and by_pid[pid].role.program == "denoising"]
        worker = _drawn([by_pid[pid] for pid in sorted(busy)], fault.draw)
        owner = await self._owner_of(running[worker.pid][0]) if worker else ""
        coordinator = next((each for each in self._fleet.of(coordinators=True) if owner and each.owner == owner), None)
        worker = worker or _drawn(self._fleet.of(coordinators=False), fault.draw)
        coordinator = coordinator or _drawn(self._fleet.of(coordinators=True), fault.draw)
        if worker is None or coordinator is None:
            return False
        requests = dict.fromkeys((*running.get(worker.pid, ()), *await self._runs_of(coordinator)))
        self._note(fault, f"{worker.name} and {coordinator.name}", tuple(requests))
        self._fleet.signal(worker, signal.SIGKILL)
        self._fleet.signal(coordinator, signal.SIGKILL)
        return True

    async def _restart_store(self, fault: Fault) -> bool:
        async with self._store_lock:
            self._note(fault, "Redis")
            await asyncio.to_thread(self._fleet.server.kill)
            await asyncio.sleep(fault.seconds)
            await asyncio.to_thread(self._fleet.server.start)
            self._fleet.note(f"Redis is available again ({fault.number})")
        return True

    async def _partition(self, fault: Fault) -> bool:
        """Partition a coordinator or worker from the store, or a worker from the coordinators."""
        from_store = fault.kind in (Kind.HOLD_STORE, Kind.CUT_STORE)
        workers = list(self._fleet.of(coordinators=False))
        candidates = [*self._fleet.of(coordinators=True), *workers[::3]] if from_store else workers
        target = _drawn(candidates, fault.draw)
        if target is None:
            return False
        running = (await self.runs_by_worker()).get(target.pid, ()) if not from_store else ()
        link: Link | None = target.store if from_store else target.access
        assert link is not None
        self._note(fault, target.name, running)
        (link.hold if fault.kind in (Kind.HOLD_STORE, Kind.HOLD_WORKER) else link.cut)()
        await asyncio.sleep(fault.seconds)
        link.heal()
        self._fleet.note(f"{target.name} is connected again ({fault.number})")
        return True

    def _read_slowly(self, fault: Fault) -> bool:
        is_watch = fault.kind is Kind.SLOW_WATCH
        known = [each.outcome for each in self._clients if each.outcome.request_id]
        known = known if is_watch else [outcome for outcome in known if outcome.files]
        target, outcome = _drawn(self._fleet.of(coordinators=True), fault.draw), _drawn(known, fault.draw)
        if target is None or outcome is None:
            return False
        self._note(fault, f"{target.name}, of request {outcome.request_id}")
        start_call = self.peers.watch_without_reading if is_watch else self.peers.download_without_reading
        start_call(target, outcome.order.caller, outcome.request_id)
        return True

    async def _send_malformed(self, fault: Fault) -> bool:
        candidates = self._fleet.of(coordinators=fault.kind is Kind.MALFORMED_COORDINATOR)
        target = _drawn(candidates, fault.draw)
        if target is None:
            return False
        self._note(fault, target.name)
        self._fleet.note(f"{await self.peers.send_malformed(target, fault.draw)} ({fault.number})")
        return True

    async def runs_by_worker(self) -> dict[int, tuple[str, ...]]:
        """Result of runs_by_pid(); empty while the store is unavailable, as the requests are then unknown."""
        try:
            return await runs_by_pid(self._redis)
        except Unavailable:
            return {}

    async def _runs_of(self, coordinator: Process) -> tuple[str, ...]:
        """Open requests that a coordinator owns."""
        owner, known = coordinator.owner, [client.outcome for client in self._clients if client.outcome.request_id]
        open_ones = [outcome.request_id for outcome in known if not is_terminal(outcome.state)]
        return tuple([name for name in open_ones if owner and await self._owner_of(name) == owner])

    async def _owner_of(self, request_id: str) -> str:
        try:
            owner: bytes | None = await command(self._redis, "HGET", f"fleet:request:{request_id}", "owner")
        except Unavailable:
            return ""
        return (owner or b"").decode()


def _drawn(candidates: Sequence[T], draw: float) -> T | None:
    return candidates[int(draw * len(candidates))] if candidates else None


async def runs_by_pid(redis: Redis) -> dict[int, tuple[str, ...]]:
    """Requests that hold a worker slot, by the PID of the worker, which is a part of the worker id."""
    runs: dict[int, tuple[str, ...]] = {}
    for key in await command(redis, "KEYS", "fleet:slots:*"):
        for ticket, slot in (await command(redis, "HGETALL", key)).items():
            pid = int(slot.decode().partition("|")[0].split("-")[-2])
            runs[pid] = (*runs.get(pid, ()), ticket.decode().partition("/")[0])
    return runs
