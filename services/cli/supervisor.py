"""Keeps the processes of `fleet up` running: starts them, again where one ends, and ends them all by process id."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.errors import FleetError
from common.tether import tethered

# glibc otherwise gives every large buffer back to the kernel and faults it in again: most of what a tensor's way costs.
_MALLOC = "glibc.malloc.mmap_threshold=268435456:glibc.malloc.trim_threshold=268435456:glibc.malloc.arena_max=4"
_STEADY_SECONDS = 10.0
_MOST_DEATHS = 5
_FIRST_DELAY = 0.5
_GRACE_SECONDS = 40.0


class ServiceEnded(FleetError):
    """A process of the fleet ended and is not worth starting again. `code` is its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Program:
    """One process to keep running: a name for messages, and the arguments of `fleet`."""

    name: str
    arguments: tuple[str, ...]


class Supervisor:
    """Runs programs until it is told to stop.

    A program that ends before the fleet is ready ends the fleet: its configuration is wrong. Later it is started
    again, with growing delays; five deaths in a row, each within ten seconds, end the fleet too.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self.ready = False

    async def keep(self, program: Program) -> None:
        """Start the program and keep it running. Raises ServiceEnded when that is hopeless."""
        deaths, delay = 0, _FIRST_DELAY
        while True:
            began = time.monotonic()
            process = await _start(program)
            self._running[program.name] = process
            self._note(f"{program.name}: started, pid {process.pid}")
            code = await process.wait()
            del self._running[program.name]
            ended = f"{program.name} (pid {process.pid}) ended with {_meaning(code)}"
            if time.monotonic() - began > _STEADY_SECONDS:
                deaths, delay = 0, _FIRST_DELAY
            deaths += 1
            if not self.ready:
                raise ServiceEnded(f"{ended} before the fleet was ready", code)
            if deaths >= _MOST_DEATHS:
                raise ServiceEnded(f"{ended}, {deaths} times in a row", code)
            self._note(f"{ended}; starting it again in {delay:g} s")
            await asyncio.sleep(delay)
            delay *= 2

    async def stop(self, names: Sequence[str]) -> None:
        """SIGTERM to these programs, SIGKILL to those that outlive the grace time; returns when they have ended."""
        processes = [self._running[name] for name in names if name in self._running]
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GRACE_SECONDS):
                    await _ended(processes)
        finally:
            for process in processes:
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
        await _ended(processes)


async def _ended(processes: Sequence[asyncio.subprocess.Process]) -> None:
    await asyncio.gather(*(process.wait() for process in processes))


async def _start(program: Program) -> asyncio.subprocess.Process:
    command = [sys.executable, "-m", "services.cli", *program.arguments]
    return await asyncio.create_subprocess_exec(
        *tethered(command),
        env={"GLIBC_TUNABLES": _MALLOC, **os.environ},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=sys.stderr.fileno(),
        start_new_session=True,
    )


def _meaning(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
