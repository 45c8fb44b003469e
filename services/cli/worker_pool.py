"""The workers of one service on this host, with an adjustable number of replicas."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from typing import Any

from services.cli.supervisor import Program, ServiceEnded, Supervisor


class WorkerPool:
    """Runs a requested number of workers of one service.

    `program` returns the program of a worker number. A number is reused after its program has exited. `spawn` runs a
    coroutine in the background. Scale-in stops the newest workers with SIGTERM. These workers finish or hand over their
    requests, and do not count in `size`. If a worker of a ready fleet fails permanently, for example because memory is
    exhausted, `most` becomes the number of the remaining workers.
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
        """Maximum number of workers, which decreases when a worker fails permanently."""
        return self._most

    def resize(self, count: int) -> None:
        """Start or stop workers until `size` is `count`. Does not wait for them."""
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
        """Remove a worker permanently. Returns whether other workers remain."""
        if number in self._numbers:
            self._numbers.remove(number)
            self._most = len(self._numbers)
        return bool(self._numbers)
