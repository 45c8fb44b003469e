"""The fleet of a chaos run: a store, and services that a warm parent forks, each behind links."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import re
import signal
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from chaos_links import Link
from warm_starter import TREE, WarmStarter

from async_tests import wait_until
from redis_servers import RedisServer, server_binaries

SERVICES = ("text_encoding", "latent_preparation", "denoising", "decoding")
_LARGEST_SKEW_SECONDS = 7_200.0
_IDLE_SECONDS = 2.0
_KILLED_SECONDS = 10.0
_OWNER = re.compile(r"coordinator-[0-9a-f]{12}")

# Short heartbeat intervals, as a take-over waits for several intervals.
QUICK_COORDINATOR = (
    *("--heartbeat-seconds", "0.3", "--heartbeat-ttl-seconds", "1.5", "--step-seconds", "0", "--grace-seconds", "2"),
)
_QUICK_WORKER = (*("--device", "cpu", "--threads", "1", "--grace-seconds", "5", "--idle-seconds", str(_IDLE_SECONDS)),)
_EVERY_STEP = {
    "denoising": ("--step-checkpoint-every", "1", "--step-seconds", "0"),
    "decoding": ("--step-seconds", "0"),
}


def quick_worker(service: str) -> tuple[str, ...]:
    """Flags of a worker that reports every step and has short timeouts."""
    return (*_QUICK_WORKER, *_EVERY_STEP.get(service, ()))


def credentials(caller: str) -> tuple[tuple[str, str]]:
    """Call metadata with the API key of a caller."""
    return (("authorization", f"Bearer key-of-{caller}"),)


def write_keys(path: Path, callers: Sequence[str]) -> None:
    """Write the key of each caller, as credentials() sends it, for the setting `api_keys`."""
    digests = {name: hashlib.sha256(f"key-of-{name}".encode()).hexdigest() for name in callers}
    path.write_text("".join(f'[callers.{name}]\nkey_sha256 = ["{digest}"]\n' for name, digest in digests.items()))


class Role(NamedTuple):
    """Role of a process: a service of a model, or a coordinator for all models."""

    program: str
    model: str = ""


COORDINATOR = Role("coordinator")


@dataclass(eq=False)
class Process:
    """A process of the fleet. `store` is its link to Redis; `access` is the coordinators' link to a worker.

    `left_early`: the process received SIGTERM before it listened. It cannot have lost a request. If its
    signal handlers were not installed yet, SIGTERM ended the process by the default action.
    `tree`: the source tree that the process runs.
    """

    name: str
    role: Role
    tree: Path
    log: Path
    socket: Path
    store: Link
    access: Link | None
    pid: int = 0
    is_ending: bool = False
    is_stopped: bool = False
    left_early: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    code: int | None = None

    @property
    def target(self) -> str:
        """gRPC target without a link."""
        return f"unix:{self.socket}"

    @property
    def owner(self) -> str:
        """A coordinator's owner name in the store; empty until it appears in its log."""
        found = _OWNER.search(self.log.read_text(errors="replace")) if self.log.exists() else None
        return found[0] if found else ""


class Fleet:
    """Starts processes, and replaces each process that ends. `findings` are unexpected exits.

    Each of the `services` of a model has `workers` workers; `denoisers` overrides this number for denoising. If
    `callers` are given, coordinators serve only these callers. `coordinator_flags` and `worker_flags` are settings of
    the processes. A new process runs the source tree in the attribute `tree`, which is initially the first of `trees`.
    """

    def __init__(
        self,
        directory: Path,
        models: Mapping[str, Path],
        skews: random.Random,
        *,
        coordinators: int,
        workers: int,
        denoisers: int = 0,
        services: Sequence[str] = SERVICES,
        callers: Sequence[str] = (),
        coordinator_flags: Sequence[str] = QUICK_COORDINATOR,
        worker_flags: Callable[[str], Sequence[str]] = quick_worker,
        trees: Sequence[Path] = (TREE,),
    ) -> None:
        self.models = models
        self.server = RedisServer(server_binaries()["valkey"])
        self.directory = directory
        self.living: list[Process] = []
        self.all: list[Process] = []
        self.findings: list[str] = []
        self.history: list[str] = []
        self._skews = skews
        self._callers = callers
        self._coordinator_flags = coordinator_flags
        self._worker_flags = worker_flags
        self.workers = dict.fromkeys(services, workers) | {"denoising": denoisers or workers}
        roles = [Role(service, model) for model in models for service in services]
        self.roles = [COORDINATOR] * coordinators + [role for role in roles for _ in range(self.workers[role.program])]
        self.tree = trees[0]
        self._starters = {tree: WarmStarter(tree) for tree in trees}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing = False
        self._began = time.monotonic()

    def note(self, what: str) -> None:
        """Append a message with the time since the start to the history."""
        self.history.append(f"{time.monotonic() - self._began:8.3f} s  {what}")

    async def start(self) -> None:
        """Start everything; returns once every process has been forked."""
        if self._callers:
            write_keys(self._keys, self._callers)
        await asyncio.to_thread(self.server.start)
        await asyncio.gather(*(starter.start(self._references()) for starter in self._starters.values()))
        await asyncio.gather(*(self._spawn(role) for role in self.roles))

    @property
    def logs(self) -> dict[str, Path]:
        """Log files of all processes, including ended ones, by name."""
        return {process.name: process.log for process in self.all}

    @property
    def _keys(self) -> Path:
        return self.directory / "keys.toml"

    def _references(self) -> list[str]:
        return [f"{name}={path}" for name, path in self.models.items()]

    async def _spawn(self, role: Role) -> Process:
        number = len(self.all)
        name = f"{number}-{role.program}" + (f"-{role.model}" if role.model else "")
        socket = self.directory / f"{number}.sock"
        access = Link(socket) if role.model else None
        log, tree = self.directory / f"{name}.log", self.tree
        process = Process(name, role, tree, log, socket, Link(self.server.socket), access)
        self.all.append(process)
        await process.store.start()
        if access is not None:
            await access.start()
        skew = self._skews.uniform(-_LARGEST_SKEW_SECONDS, _LARGEST_SKEW_SECONDS)
        starter = self._starters[tree]
        forked = await starter.fork(role.program, self._arguments(process), process.log, skew=round(skew, 3))
        process.pid = forked.pid
        self.living.append(process)
        forked.ended.add_done_callback(lambda ended: self._ended(process, ended.result()))
        self.note(f"{name} starts as process {process.pid}, its clock {skew:+.0f} s")
        return process

    def _arguments(self, process: Process) -> list[str]:
        flags = ["--listen", process.target, "--redis", f"redis://{process.store.address}/0"]
        if process.access is None:
            references = [argument for reference in self._references() for argument in ("--model", reference)]
            keys = ("--api-keys", str(self._keys)) if self._callers else ()
            return [*flags, *references, *keys, *self._coordinator_flags]
        model = process.role.model
        return [
            *flags,
            "--model",
            f"{model}={self.models[model]}",
            "--advertise",
            process.access.address,
            *self._worker_flags(process.role.program),
        ]

    def _ended(self, process: Process, code: int) -> None:
        process.code = code
        self.living.remove(process)
        process.ended.set()
        self.note(f"{process.name} ends with code {code}")
        if not process.is_ending:
            self.findings.append(f"{process.name} exited unexpectedly with code {code}; see {process.log}")
        elif code not in (0, -signal.SIGKILL) and not (process.left_early and code == -signal.SIGTERM):
            self.findings.append(f"{process.name} received SIGTERM and exited with code {code}; see {process.log}")
        if not self._closing:
            self._start_task(self._replace(process))

    async def _replace(self, process: Process) -> None:
        await self._close_links(process)
        await self._spawn(process.role)

    def _start_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _close_links(self, process: Process) -> None:
        await process.store.close()
        if process.access is not None:
            await process.access.close()

    def of(self, *, coordinators: bool) -> Sequence[Process]:
        """Running coordinators, or running workers, that are not ending."""
        return [each for each in self.living if (each.role == COORDINATOR) == coordinators and not each.is_ending]

    def signal(self, process: Process, number: signal.Signals) -> None:
        """Send a signal to a running process."""
        if process.ended.is_set():
            return
        listened = process.socket.exists()
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:  # The process has exited; its parent has not reported the exit yet.
            return
        process.is_ending |= number in (signal.SIGKILL, signal.SIGTERM)
        process.is_stopped = number == signal.SIGSTOP
        process.left_early |= number == signal.SIGTERM and not listened

    def heal(self) -> None:
        """Resume every process and heal every link."""
        for process in self.living:
            if process.is_stopped and not process.is_ending:
                self.signal(process, signal.SIGCONT)
            process.store.heal()
            if process.access is not None:
                process.access.heal()

    async def is_complete(self) -> bool:
        """Whether every role has its number of processes."""
        roles = [process.role for process in self.living if not process.is_ending]
        return sorted(roles) == sorted(self.roles) and not self._tasks

    async def replace(self, process: Process, tree: Path) -> Process:
        """End a process gracefully; returns its replacement, which runs `tree` and listens."""
        self.tree = tree
        before = len(self.all)
        self.signal(process, signal.SIGTERM)
        await process.ended.wait()
        await wait_until(self.is_complete)
        (successor,) = (each for each in self.all[before:] if each.role == process.role)

        async def listens() -> bool:
            return successor.socket.exists() or successor.ended.is_set()

        await wait_until(listens)
        return successor

    async def stop(self, seconds: float = 30.0) -> None:
        """Send SIGTERM to all processes, coordinators first. Kill and report processes that run on after `seconds`."""
        self._closing = True
        self.heal()
        for coordinators in (True, False):
            leaving = list(self.of(coordinators=coordinators))
            for process in leaving:
                self.signal(process, signal.SIGTERM)
            await self._wait_ended(leaving, seconds)
        for process in list(self.living):
            self.findings.append(f"{process.name} did not exit within {seconds:g} s of SIGTERM; see {process.log}")
            self.signal(process, signal.SIGKILL)
        await self._wait_ended(self.living, seconds)

    async def kill(self) -> None:
        """Send SIGKILL to every process except the store, and start no replacements."""
        self._closing = True
        killed = list(self.living)
        for process in killed:
            self.signal(process, signal.SIGKILL)
        await self._wait_ended(killed, _KILLED_SECONDS)

    async def _wait_ended(self, processes: Sequence[Process], seconds: float) -> None:
        waits = [asyncio.ensure_future(process.ended.wait()) for process in processes]
        if waits:
            _, late = await asyncio.wait(waits, timeout=seconds)
            for each in late:
                each.cancel()

    async def close(self) -> None:
        """Close the links, the warm parents and the store."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for process in self.all:
            await self._close_links(process)
        for starter in self._starters.values():
            await starter.close()
        self.server.remove()
