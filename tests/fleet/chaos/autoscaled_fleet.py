"""A fleet of real processes: a coordinator, and pools of workers that autoscalers resize."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from chaos_checks import check_logs
from chaos_faults import runs_by_pid
from redis.asyncio import Redis
from warm_starter import Forked, WarmStarter

from common.rpc.client import open_channel
from models.catalog import ServedModel
from services.cli.autoscale import ScalerClient, StageAutoscaler, StageTarget
from services.cli.replica_policy import ReplicaBounds, ReplicaPolicy

_GRACE_SECONDS = 20
_POLL_SECONDS = 0.2
_ON_CPU = ("--device", "cpu", "--threads", "1", "--grace-seconds", str(_GRACE_SECONDS))
_EVERY_STEP = {"denoising": ("--step-checkpoint-every", "1", "--step-seconds", "0")}


@dataclass(eq=False)
class ScaledWorker:
    """A worker process.

    `left_early`: the worker received SIGTERM before it listened, perhaps before it installed its signal handlers.
    """

    name: str
    socket: Path
    log: Path
    started: asyncio.Future[Forked]
    left_early: bool = False


@dataclass(frozen=True)
class ScaleIn:
    """A scale-in of `worker`. The other fields are read just before SIGTERM is sent.

    `own_requests` are ids of requests that ran on `worker`; `requests` is the number of requests on all workers.
    """

    worker: str
    own_requests: tuple[str, ...]
    requests: int


@dataclass
class ScalingHistory:
    """Recorded scaling events. `started`: time.monotonic() of the first worker's start, by service.

    `most` is the largest number of workers by service; `notes` are the autoscalers' messages.
    """

    started: dict[str, float] = field(default_factory=dict)
    most: Counter[str] = field(default_factory=Counter)
    scale_outs: int = 0
    scale_ins: list[ScaleIn] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def during_requests(self) -> int:
        """Number of scale-ins while requests ran."""
        return sum(each.requests > 0 for each in self.scale_ins)

    @property
    def of_busy_workers(self) -> int:
        """Number of scale-ins of workers that ran a request."""
        return sum(bool(each.own_requests) for each in self.scale_ins)


class ProcessPool:
    """Worker processes of one service. Scale-in sends SIGTERM to the newest worker; SIGKILL is never sent."""

    def __init__(self, fleet: AutoscaledFleet, service: str) -> None:
        self._fleet = fleet
        self._service = service
        self._workers: list[ScaledWorker] = []
        self.ending = 0

    @property
    def size(self) -> int:
        """Number of running and starting workers, without workers that are ending."""
        return len(self._workers)

    @property
    def most(self) -> int:
        """Largest size of the pool: unlimited, because the autoscaler has its own limit."""
        return sys.maxsize

    def resize(self, count: int) -> None:
        """Start or end workers, without waiting for them."""
        history = self._fleet.history
        history.started.setdefault(self._service, time.monotonic())
        while len(self._workers) < count:
            worker = self._fleet.new_worker(self._service)
            self._workers.append(worker)
            history.scale_outs += 1
            self._fleet.spawn(self._run(worker))
        history.most[self._service] = max(history.most[self._service], len(self._workers))
        while len(self._workers) > count:
            self.ending += 1
            self._fleet.spawn(self._end(self._workers.pop()))

    async def _run(self, worker: ScaledWorker) -> None:
        worker.started.set_result(await self._fleet.fork(self._service, worker))
        code = await (await worker.started).ended
        if worker in self._workers:
            self._workers.remove(worker)
            self._fleet.history.findings.append(f"{worker.name} exited unexpectedly with code {code}; see {worker.log}")
            return
        self.ending -= 1
        if code != 0 and not (worker.left_early and code == -signal.SIGTERM):
            self._fleet.history.findings.append(
                f"{worker.name} received SIGTERM and exited with code {code}; see {worker.log}"
            )

    async def _end(self, worker: ScaledWorker) -> None:
        forked = await worker.started
        runs = await runs_by_pid(self._fleet.redis)
        own = runs.get(forked.pid, ())
        self._fleet.history.scale_ins.append(ScaleIn(worker.name, own, sum(map(len, runs.values()))))
        worker.left_early = not worker.socket.exists()
        with suppress(ProcessLookupError):
            os.kill(forked.pid, signal.SIGTERM)
        _, late = await asyncio.wait((forked.ended,), timeout=_GRACE_SECONDS + 10)
        if late:
            self._fleet.history.findings.append(f"{worker.name} did not exit within its grace period; see {worker.log}")


class AutoscaledFleet:
    """A permanent coordinator, and a pool of workers for each service of one model."""

    def __init__(
        self, model: ServedModel, directory: Path, redis: Redis, redis_url: str, bounds: Mapping[str, ReplicaBounds]
    ) -> None:
        self.model = model
        self.redis = redis
        self.history = ScalingHistory()
        self.endpoint = f"unix:{directory}/coordinator.sock"
        self.pools = {spec.service: ProcessPool(self, spec.service) for spec in model.services}
        self._reference = f"{model.name}={model.checkpoint.path.resolve()}"
        self._scaler = f"unix:{directory}/scaler.sock"
        self._directory = directory
        self._redis_url = redis_url
        self._bounds = bounds
        self._starter = WarmStarter()
        self._numbers = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._logs: dict[str, Path] = {}
        self._coordinator: Forked | None = None
        self._channel: grpc.aio.Channel = open_channel(self._scaler)

    async def start(self, target_seconds: float) -> None:
        """Start the coordinator and the autoscaler of each service, without workers."""
        await self._starter.start([self._reference])
        self._logs["coordinator"] = self._directory / "coordinator.log"
        flags = ("--listen", self.endpoint, "--scaler-listen", self._scaler, "--step-seconds", "0")
        self._coordinator = await self._starter.fork(
            "coordinator", self._with_common_flags(flags), self._logs["coordinator"]
        )
        async with asyncio.timeout(30):
            await self._channel.channel_ready()
        for service, pool in self.pools.items():
            client = ScalerClient(self._channel, StageTarget(self.model.name, service, target_seconds))
            policy = ReplicaPolicy(self._bounds[service])
            scaler = StageAutoscaler(
                client, pool, policy, name=service, poll_seconds=_POLL_SECONDS, note=self.history.notes.append
            )
            self.spawn(scaler.run())

    @property
    def is_at_zero(self) -> bool:
        """Whether no worker runs or is ending."""
        return not any(pool.size or pool.ending for pool in self.pools.values())

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in the background; close() raises its error."""
        task = asyncio.create_task(work)
        self._tasks.add(task)

    def new_worker(self, service: str) -> ScaledWorker:
        """A worker with a new name, socket and log."""
        number = next(self._numbers)
        name = f"{number}-{service}"
        self._logs[name] = self._directory / f"{name}.log"
        started: asyncio.Future[Forked] = asyncio.get_running_loop().create_future()
        return ScaledWorker(name, self._directory / f"{number}.sock", self._logs[name], started)

    async def fork(self, service: str, worker: ScaledWorker) -> Forked:
        """Start the process of a worker."""
        flags = ("--listen", f"unix:{worker.socket}", *_ON_CPU, *_EVERY_STEP.get(service, ()))
        return await self._starter.fork(service, self._with_common_flags(flags), worker.log)

    def _with_common_flags(self, flags: tuple[str, ...]) -> tuple[str, ...]:
        return (*flags, "--redis", self._redis_url, "--model", self._reference)

    async def close(self) -> None:
        """Stop all processes. Raises the first error of a background task."""
        if self._coordinator is not None:
            os.kill(self._coordinator.pid, signal.SIGTERM)
            await self._coordinator.ended
        for task in self._tasks:
            task.cancel()
        ends = await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()
        await self._starter.close()
        self.history.findings += check_logs(self._logs)
        for end in ends:
            if isinstance(end, Exception):
                raise end
