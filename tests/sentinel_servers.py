"""A Valkey primary, a synchronized replica and an optional sentinel: real processes on loopback."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import redis

from async_tests import HANG_SECONDS, poll
from redis_servers import server_binaries


def free_port() -> int:
    """Return a free TCP port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _started(directory: Path, port: int, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    directory.mkdir(exist_ok=True)
    command = [str(server_binaries()["valkey"]), *options, "--port", str(port), "--bind", "127.0.0.1"]
    process = subprocess.Popen([*command, "--dir", str(directory)], stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@dataclass(frozen=True)
class Replicated:
    """Running servers. `url` is the URL of the primary, or of the service that the sentinel monitors.

    `sentinel_port` is 0 without a sentinel.
    """

    url: str
    replica_url: str
    primary: subprocess.Popen[bytes]
    replica: subprocess.Popen[bytes]
    sentinel_port: int = 0

    def kill_primary(self) -> None:
        """Kill the primary. The sentinel then replaces it with the replica.

        Until then, the sentinel's timeout is longer than a test, so that a slow primary is not replaced.
        """
        with cast(Any, redis.Redis)(port=self.sentinel_port) as client:
            client.execute_command("SENTINEL", "SET", "fleet", "down-after-milliseconds", "300")
        self.primary.kill()

    def stop_replica(self) -> None:
        """Stop the replica with SIGSTOP, as in a network partition."""
        self.replica.send_signal(signal.SIGSTOP)

    def continue_replica(self) -> None:
        """Resume the replica with SIGCONT."""
        self.replica.send_signal(signal.SIGCONT)


@contextmanager
def replicated_servers(directory: Path, *, sentinel: bool = False) -> Iterator[Replicated]:
    """Start the servers, with data below `directory`; returns once the replica acknowledges writes."""
    first, second, watch = free_port(), free_port(), free_port()
    with ExitStack() as stack:
        options = ("--appendonly", "yes", "--repl-diskless-sync-delay", "0")
        primary = stack.enter_context(_started(directory / "first", first, *options))
        replica = stack.enter_context(
            _started(directory / "second", second, *options, "--replicaof", "127.0.0.1", str(first))
        )
        _poll_server(first, lambda client: client.set("warm", "1") and client.wait(1, 1_000) and client.delete("warm"))
        url = f"redis://127.0.0.1:{first}"
        if sentinel:
            config = directory / "sentinel.conf"
            lines = [f"sentinel monitor fleet 127.0.0.1 {first} 1"]
            lines += [f"sentinel down-after-milliseconds fleet {int(HANG_SECONDS * 1_000)}"]
            lines += ["sentinel failover-timeout fleet 2000"]
            config.write_text("\n".join(lines) + "\n", encoding="utf-8")
            stack.enter_context(_started(directory, watch, str(config), "--sentinel"))
            _poll_server(watch, lambda client: client.execute_command("SENTINEL", "REPLICAS", "fleet"))
            url = f"redis+sentinel://127.0.0.1:{watch}/fleet"
        yield Replicated(url, f"redis://127.0.0.1:{second}", primary, replica, watch if sentinel else 0)


def _poll_server(port: int, is_ready: Callable[[Any], Any]) -> None:
    """Poll a server until the reply of `is_ready` is truthy. A server that is starting refuses the connection."""

    def replies() -> bool:
        try:
            with cast(Any, redis.Redis)(port=port, socket_timeout=5) as client:
                return bool(is_ready(client))
        except redis.RedisError:
            return False

    poll(replies, HANG_SECONDS, f"the server on port {port} replies")
