"""The workers of one service on this host, whose number an autoscaler changes."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from services.cli.supervisor import Program, Supervisor


class WorkerPool:
    """Runs as many workers of one service as it was last asked for.

    `program` returns the program of a number; numbers are used again when their programs have ended. `spawn` runs a
    program's coroutine in the background. Scale-in ends the newest workers: SIGTERM, after which each finishes or hands
    over its requests. A worker that is ending does not count.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
        program: Callable[[int], Program],
    ) -> None:
        self._supervisor = supervisor
        self._spawn = spawn
        self._program = program
        self._numbers: list[int] = []
        self._ending: set[int] = set()

    @property
    def size(self) -> int:
        """Workers that run or start, and are not ending."""
        return len(self._numbers)

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
        finally:
            self._ending.discard(number)
