"""A worker that is far away, or too busy to answer at once, is a worker all the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from common.rpc.client import RemoteRunner, open_channel
from stage_server import SERVICE, RecordedCall, packets, served

DELAY_SECONDS = 0.4


@asynccontextmanager
async def slow_road_to(address: str) -> AsyncIterator[str]:
    """An address that leads to another one; what comes back takes its time at first."""
    host, _, port = address.rpartition(":")
    roads: list[asyncio.Task[None]] = []

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
        try:
            await asyncio.sleep(delay)
            while data := await reader.read(1 << 16):
                writer.write(data)
        finally:
            writer.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(host, int(port))
        roads.append(asyncio.create_task(carry(reader, back, 0)))
        roads.append(asyncio.create_task(carry(there, writer, DELAY_SECONDS)))

    async with await asyncio.start_server(connect, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    for road in roads:
        road.cancel()
    await asyncio.gather(*roads, return_exceptions=True)


def test_a_peer_that_answers_late_is_reached() -> None:
    async def main() -> None:
        async with (
            asyncio.timeout(60),
            served() as stage,
            slow_road_to(stage.server.address) as address,
            open_channel(address) as channel,
        ):
            outputs = await RemoteRunner(channel, SERVICE, stage.hosted.contract)(packets(8), RecordedCall().call())
            assert outputs.keys() == {"denoised_latents"}

    asyncio.run(main())
