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
from services.cli.options import BAD_INPUT

# glibc otherwise gives every large buffer back to the kernel and faults it in again: most of what a tensor's way costs.
_MALLOC = "glibc.malloc.mmap_threshold=268435456:glibc.malloc.trim_threshold=268435456:glibc.malloc.arena_max=4"
_STEADY_SECONDS = 60.0  # longer than a worker that fails takes to load most models
_MOST_DEATHS = 5
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 10.0
_FROM_OUTSIDE = (-signal.SIGKILL, -signal.SIGTERM)  # also the kernel's, when memory runs out
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

    A program that ends before the fleet is ready ends the fleet: its configuration is wrong. So does exit code 2 at any
    time, such as for weights that cannot be read: another start changes nothing. Otherwise a program is started again,
    with delays that grow up to 10 s. Five failures in a row, each within a minute, end the fleet too; SIGKILL and
    SIGTERM from outside are no failures.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._retired: dict[str, asyncio.Event] = {}
        self.ready = False

    @property
    def running(self) -> list[str]:
        """Names of the programs that run, also of those that are ending."""
        return list(self._running)

    async def keep(self, program: Program) -> None:
        """Start the program and keep it running until it is retired. Raises ServiceEnded when that is hopeless."""
        retired = self._retired.setdefault(program.name, asyncio.Event())
        deaths, delay = 0, _FIRST_DELAY
        try:
            while not retired.is_set():
                began = time.monotonic()
                ended, code = await self._run(program, retired)
                if retired.is_set():
                    self._note(f"{ended}, as it was not needed")
                    return
                if time.monotonic() - began > _STEADY_SECONDS:
                    deaths, delay = 0, _FIRST_DELAY
                deaths += code not in _FROM_OUTSIDE
                if not self.ready:
                    raise ServiceEnded(f"{ended} before the fleet was ready", code)
                if code == BAD_INPUT:
                    raise ServiceEnded(f"{ended}, which another start does not change", code)
                if deaths >= _MOST_DEATHS:
                    raise ServiceEnded(f"{ended}, {deaths} times in a row", code)
                self._note(f"{ended}; starting it again in {delay:g} s")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(retired.wait(), delay)
                delay = min(2 * delay, _LONGEST_DELAY)
        finally:
            del self._retired[program.name]

    def retire(self, program: Program) -> None:
        """Have a program that is kept end for good: SIGTERM now, SIGKILL after the grace time. Its end is no death."""
        self._retired.setdefault(program.name, asyncio.Event()).set()
        if program.name in self._running:
            _retire(self._running[program.name])

    async def _run(self, program: Program, retired: asyncio.Event) -> tuple[str, int]:
        """Run the program once; returns a sentence about its end, and its exit code."""
        process = await _start(program)
        self._running[program.name] = process
        self._note(f"{program.name}: started, pid {process.pid}")
        if retired.is_set():
            _retire(process)
        code = await process.wait()
        del self._running[program.name]
        return f"{program.name} (pid {process.pid}) ended with {_meaning(code)}", code

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
                _kill(process)
        await _ended(processes)


def _retire(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    asyncio.get_running_loop().call_later(_GRACE_SECONDS, _kill, process)


def _kill(process: asyncio.subprocess.Process) -> None:
    """SIGKILL, unless the process has ended."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()


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
