"""A client connects to a worker whose first reply is slow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from async_tests import run_within
from common.rpc.client import RemoteRunner, open_channel
from stage_server import SERVICE, RecordedCall, packets, served

DELAY_SECONDS = 0.4


@asynccontextmanager
async def slow_link_to(address: str) -> AsyncIterator[str]:
    """Forward an address; the first reply of each connection is delayed."""
    host, _, port = address.rpartition(":")
    forwarding: list[asyncio.Task[None]] = []

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
        try:
            await asyncio.sleep(delay)
            while data := await reader.read(1 << 16):
                writer.write(data)
        finally:
            writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))
        forwarding.append(asyncio.create_task(forward(reader, back, 0)))
        forwarding.append(asyncio.create_task(forward(there, writer, DELAY_SECONDS)))

    async with await asyncio.start_server(connect, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    for task in forwarding:
        task.cancel()
    await asyncio.gather(*forwarding, return_exceptions=True)


def test_slow_peer_is_reached() -> None:
    async def test() -> None:
        async with (
            served() as stage,
            slow_link_to(stage.server.address) as address,
            open_channel(address) as channel,
        ):
            outputs = await RemoteRunner(channel, SERVICE, stage.hosted.contract)(packets(8), RecordedCall().call())
            assert outputs.keys() == {"denoised_latents"}

    run_within(60, test)
