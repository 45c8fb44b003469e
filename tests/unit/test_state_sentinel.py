"""A store behind sentinels: a replica replaces the killed primary without loss of accepted requests."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from async_tests import HANG_SECONDS, wait_until
from common.errors import InvalidInput, Unavailable
from common.state.connection import command, connect
from common.state.requests import RequestStore
from fleet.v1 import generation_pb2
from sentinel_servers import Replicated, replicated_servers


def test_a_replica_replaces_a_killed_primary() -> None:
    async def scenario(servers: Replicated) -> None:
        async with connect(servers.url) as redis:
            store = RequestStore(redis)

            async def replicated() -> bool:
                return int(await command(redis, "WAIT", 1, 1_000)) == 1

            await store.admit(generation_pb2.RequestRecord(request_id="r", model="emoji"))
            await wait_until(replicated)
            servers.kill_primary()

            async def ends() -> bool:
                try:
                    return bool(await store.finish("r", generation_pb2.REQUEST_STATE_CANCELLED))
                except Unavailable:
                    return False

            await wait_until(ends)
            assert (await store.get("r")).state == generation_pb2.REQUEST_STATE_CANCELLED

    async def main() -> None:
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-sentinel-")))
            async with asyncio.timeout(HANG_SECONDS):
                await scenario(stack.enter_context(replicated_servers(directory, sentinel=True)))

    asyncio.run(main())


@pytest.mark.parametrize("url", ["redis+sentinel://host:1", "redis+sentinel:///service", "redis+sentinel://host/s"])
def test_an_incomplete_sentinel_url_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="redis\\+sentinel://host"):
        connect(url)
