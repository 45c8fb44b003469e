"""The workers of one service on this host, with an adjustable number of replicas."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from typing import Any

from services.cli.supervisor import Program, ServiceEnded, Supervisor


class WorkerPool:
    """Runs a requested number of workers of one service.

    `program` returns the program of a worker number; numbers are reused when their programs have exited. `spawn` runs a
    program's coroutine in the background. Scale-in stops the newest workers with SIGTERM; they finish or hand over
    their requests, and no longer count. If a worker of a ready fleet cannot run beside the others, for example without
    free memory, `most` becomes the number of the others.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        program: Callable[[int], Program],
        note: Callable[[str], None],
    ) -> None:
        self._supervisor = supervisor
        self._note = note
        self._most = sys.maxsize
        self._spawn = spawn
        self._program = program
        self._numbers: list[int] = []
        self._ending: set[int] = set()

    @property
    def size(self) -> int:
        """Workers that are running or starting, without those that are shutting down."""
        return len(self._numbers)

    @property
    def most(self) -> int:
        """Largest number of workers that can run, as far as known."""
        return self._most

    def resize(self, count: int) -> None:
        """Start or stop workers until there are `count`. Returns at once."""
        while len(self._numbers) < count:
            number = next(each for each in range(count + len(self._ending)) if each not in self._taken)
            self._numbers.append(number)
            self._spawn(self._run(number))
        while len(self._numbers) > count:
            number = self._numbers.pop()
            self._ending.add(number)
            self._supervisor.retire(self._program(number))

    @property
    def _taken(self) -> set[int]:
        return {*self._numbers, *self._ending}

    async def _run(self, number: int) -> None:
        try:
            await self._supervisor.supervise(self._program(number))
        except ServiceEnded as ended:
            if not self._supervisor.ready or not self._give_up(number):
                raise
            self._note(f"{ended}; the service continues with {len(self._numbers)} of its workers")
        finally:
            self._ending.discard(number)

    def _give_up(self, number: int) -> bool:
        """Remove a worker for good. Returns whether others are left."""
        if number in self._numbers:
            self._numbers.remove(number)
            self._most = len(self._numbers)
        return bool(self._numbers)
