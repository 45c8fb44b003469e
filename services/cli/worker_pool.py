"""The workers of one service on this host, whose number an autoscaler changes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from typing import Any

from services.cli.supervisor import Program, ServiceEnded, Supervisor


class WorkerPool:
    """Runs as many workers of one service as it was last asked for.

    `program` returns the program of a number; numbers are used again when their programs have ended. `spawn` runs a
    program's coroutine in the background. Scale-in ends the newest workers: SIGTERM, after which each finishes or hands
    over its requests. A worker that is ending does not count. Where one cannot run beside the others of a ready fleet,
    as without memory for it, `most` is the number of those from then on.
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
        """Workers that run or start, and are not ending."""
        return len(self._numbers)

    @property
    def most(self) -> int:
        """Workers that can run, as far as it is known."""
        return self._most

    def resize(self, count: int) -> None:
        """Start or end workers, so that there are `count`. Returns at once."""
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
            await self._supervisor.keep(self._program(number))
        except ServiceEnded as ended:
            if not self._supervisor.ready or not self._give_up(number):
                raise
            self._note(f"{ended}; the service has {len(self._numbers)} of its workers, and starts no more")
        finally:
            self._ending.discard(number)

    def _give_up(self, number: int) -> bool:
        """Do without a worker. Returns whether others are left."""
        if number in self._numbers:
            self._numbers.remove(number)
            self._most = len(self._numbers)
        return bool(self._numbers)
