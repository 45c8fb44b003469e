"""Starts services as processes forked by a warm parent, which has imported all dependencies."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TREE = Path(__file__).resolve().parents[3]
"""The source tree of this checkout."""
_WARM_PARENT = Path(__file__).resolve().relative_to(TREE).with_name("warm_parent.py")


@dataclass(frozen=True)
class Forked:
    """A process that the warm parent forked. `ended` resolves to its exit code, below 0 for a signal."""

    pid: int
    ended: asyncio.Future[int]


class WarmStarter:
    """Forks processes of one source tree; close() kills all running processes."""

    def __init__(self, tree: Path = TREE) -> None:
        self._tree = tree
        self._parent: Process | None = None
        self._listener: asyncio.Task[None] | None = None
        self._starting: deque[asyncio.Future[Forked]] = deque()
        self._running: dict[int, Forked] = {}

    async def start(self, models: Sequence[str]) -> None:
        """Start the warm parent for these models, each a reference such as NAME=DIR."""
        self._parent = await asyncio.create_subprocess_exec(
            sys.executable, str(self._tree / _WARM_PARENT), *models, stdin=PIPE, stdout=PIPE
        )
        assert self._parent.stdout is not None
        assert "ready" in json.loads(await self._parent.stdout.readline())
        self._listener = asyncio.create_task(self._listen(self._parent.stdout))

    async def fork(self, program: str, arguments: Sequence[str], log: Path, *, skew: float = 0.0) -> Forked:
        """Start a program with its output in `log` and its clock skewed by `skew` seconds."""
        command = {"program": program, "arguments": arguments, "log": str(log), "skew": skew}
        started: asyncio.Future[Forked] = asyncio.get_running_loop().create_future()
        self._starting.append(started)
        assert self._parent is not None
        assert self._parent.stdin is not None
        self._parent.stdin.write(json.dumps(command).encode() + b"\n")
        return await started

    async def close(self) -> None:
        """Stop the warm parent and all its processes."""
        if self._parent is not None and self._parent.stdin is not None:
            self._parent.stdin.close()
            await self._parent.wait()
        if self._listener is not None:
            await self._listener

    async def _listen(self, replies: asyncio.StreamReader) -> None:
        """Read the warm parent's replies. Replies about started processes are in the order of fork() calls."""
        while line := await replies.readline():
            reply = json.loads(line)
            if "started" in reply:
                forked = Forked(reply["started"], asyncio.get_running_loop().create_future())
                self._running[forked.pid] = forked
                started = self._starting.popleft()
                if not started.cancelled():
                    started.set_result(forked)
            else:
                self._running.pop(reply["ended"]).ended.set_result(reply["code"])
