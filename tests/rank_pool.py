"""A pool of rank processes, reused for all layouts because starting them is slow."""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from async_tests import HANG_SECONDS
from models.parallel.mesh import Degrees

TESTS = Path(__file__).resolve().parent
RANKS = 4


class RankFailed(Exception):
    """A rank raised an exception (the message is its traceback), exited or did not reply."""


class RankPool:
    """Processes that serve as ranks of worker groups, one group at a time. Call close() at the end.

    A layout uses the ranks from 0; their number is the product of its degrees. The backend is gloo on "cpu", and NCCL
    on "cuda", with one GPU per rank.
    """

    def __init__(self, folder: Path, kind: str = "cpu", ranks: int = RANKS) -> None:
        self._folder = folder
        self._kind = kind
        pairs = [socket.socketpair() for _ in range(ranks)]
        theirs = [pair[1].fileno() for pair in pairs]
        # GPU libraries emit warnings, so warnings are errors only on the CPU.
        strictly = ("-W", "error") if kind == "cpu" else ()
        paths = filter(None, (str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH")))
        self._process = subprocess.Popen(
            [sys.executable, *strictly, str(TESTS / "rank_process.py"), kind, *map(str, theirs)],
            pass_fds=theirs,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        for _, other in pairs:
            other.close()
        self._connections = [mine for mine, _ in pairs]
        self._answers = [mine.makefile("rb") for mine in self._connections]
        self._world_size = 0
        self._layouts = 0

    def join(self, degrees: Degrees) -> list[dict[str, int]]:
        """Form a worker group of the first ranks, for later calls; returns each rank's index on each axis."""
        self.call("rank_calls:leave")
        self._world_size = degrees.world_size
        self._layouts += 1
        store = self._folder / f"rendezvous-{self._layouts}"
        return self.call("rank_calls:join", degrees=dataclasses.asdict(degrees), store=str(store), kind=self._kind)

    def call(self, function: str, **keywords: Any) -> list[Any]:
        """Call function(rank, **keywords) on all ranks concurrently; returns the parsed JSON results by rank.

        Raises RankFailed if a rank raises, exits or does not reply. All ranks are then killed, as the other ranks may
        block on the failed rank forever.
        """
        line = (json.dumps({"call": function, **keywords}) + "\n").encode()
        try:
            for connection in self._connections[: self._world_size]:
                connection.sendall(line)
            return self._collect()
        except (RankFailed, OSError) as error:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            raise RankFailed(f"{function}: {error}") from error

    def _collect(self) -> list[Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + HANG_SECONDS
        with selectors.DefaultSelector() as selector:
            for rank in range(self._world_size):
                selector.register(self._answers[rank], selectors.EVENT_READ, rank)
            while len(results) < self._world_size:
                ready = selector.select(deadline - time.monotonic())
                if not ready:
                    raise RankFailed(f"only ranks {sorted(results)} replied within {HANG_SECONDS:g} s")
                for key, _ in ready:
                    results[key.data] = self._result(key.data)
                    selector.unregister(key.fileobj)
        return [results[rank] for rank in range(self._world_size)]

    def _result(self, rank: int) -> Any:
        line = self._answers[rank].readline()
        if not line:
            raise RankFailed(f"rank {rank} has exited")
        answer = json.loads(line)
        if "error" in answer:
            raise RankFailed(f"rank {rank}:\n{answer['error']}")
        return answer["result"]

    def close(self) -> None:
        """Close the sockets, which ends the rank processes."""
        for answers, connection in zip(self._answers, self._connections, strict=True):
            answers.close()
            connection.close()
        try:
            self._process.wait(HANG_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            raise
