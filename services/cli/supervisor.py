"""Supervisor of the processes of `fleet up`: starts, restarts and stops them."""

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

# By default, glibc returns each freed large buffer to the kernel. The page faults of the next buffer then take most of
# the time of a tensor copy.
_MALLOC = "glibc.malloc.mmap_threshold=268435456:glibc.malloc.trim_threshold=268435456:glibc.malloc.arena_max=4"

_STEADY_SECONDS = 60.0
"""Run time, in seconds, after which the count of consecutive failures is reset. Most models load in less time."""

_MOST_FAILURES = 5
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 10.0
_EXTERNAL_SIGNALS = (-signal.SIGKILL, -signal.SIGTERM)
"""Exit codes that do not count as failures. The kernel's out-of-memory killer also sends SIGKILL."""

_GRACE_SECONDS = 40.0


class ServiceEnded(FleetError):
    """A process of the fleet exited and is not restarted. `code` is its exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Program:
    """A supervised process: its name in messages, and the arguments of `fleet`."""

    name: str
    arguments: tuple[str, ...]


class Supervisor:
    """Runs programs until it is stopped.

    A program that exits before the fleet is ready fails permanently, because its configuration is probably wrong. Exit
    code 2, for example for unreadable weights, is permanent, because a restart would fail too. Five consecutive
    failures, each within a minute, are permanent. In all other cases, the program restarts after a delay of at most
    10 s. A permanent failure ends the fleet, unless WorkerPool continues with other workers of the service. SIGKILL
    and SIGTERM from other processes do not count as failures.
    """

    def __init__(self, note: Callable[[str], None]) -> None:
        self._note = note
        self._running: dict[str, asyncio.subprocess.Process] = {}
        self._retired: dict[str, asyncio.Event] = {}
        self.ready = False

    @property
    def running(self) -> list[str]:
        """Names of the running programs, including those that are shutting down."""
        return list(self._running)

    async def supervise(self, program: Program) -> None:
        """Run the program, with restarts, until it is retired. Raises ServiceEnded if a restart is not permitted."""
        retired = self._retired.setdefault(program.name, asyncio.Event())
        failures, delay = 0, _FIRST_DELAY
        try:
            while not retired.is_set():
                began = time.monotonic()
                ended, code = await self._run(program, retired)
                if retired.is_set():
                    self._note(f"{ended}; it is no longer needed")
                    return
                if time.monotonic() - began > _STEADY_SECONDS:
                    failures, delay = 0, _FIRST_DELAY
                failures += code not in _EXTERNAL_SIGNALS
                if not self.ready:
                    raise ServiceEnded(f"{ended} before the fleet was ready", code)
                if code == BAD_INPUT:
                    raise ServiceEnded(f"{ended}; a restart does not help", code)
                if failures >= _MOST_FAILURES:
                    raise ServiceEnded(f"{ended}, {failures} times in a row", code)
                self._note(f"{ended}; restarting it in {delay:g} s")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(retired.wait(), delay)
                delay = min(2 * delay, _LONGEST_DELAY)
        finally:
            del self._retired[program.name]

    def retire(self, program: Program) -> None:
        """Stop a program without a restart: SIGTERM now, SIGKILL after the grace time. Does not wait for its exit."""
        self._retired.setdefault(program.name, asyncio.Event()).set()
        if program.name in self._running:
            _retire(self._running[program.name])

    async def _run(self, program: Program, retired: asyncio.Event) -> tuple[str, int]:
        """Run the program once; returns a description of its end, and its exit code."""
        process = await _start(program)
        self._running[program.name] = process
        self._note(f"{program.name}: started, pid {process.pid}")
        if retired.is_set():
            _retire(process)
        code = await process.wait()
        del self._running[program.name]
        return f"{program.name} (pid {process.pid}) ended with {_meaning(code)}", code

    async def stop(self, names: Sequence[str]) -> None:
        """Send SIGTERM to these programs, and SIGKILL after the grace time; returns when they have exited."""
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
    """Send SIGKILL, unless the process has exited."""
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
