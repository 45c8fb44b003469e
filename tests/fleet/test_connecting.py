"""A client connects to a worker whose first reply is delayed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from async_tests import run_bounded
from common.rpc.client import RemoteRunner, open_channel
from stage_server import SERVICE, RecordedCall, packets, served

DELAY_SECONDS = 0.4


@asynccontextmanager
async def delayed_proxy(address: str) -> AsyncIterator[str]:
    """A proxy of an address that delays the first reply of each connection; yields the proxy's address."""
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
        worker_reader, worker_writer = await asyncio.open_connection(host, int(port))
        forwarding.append(asyncio.create_task(forward(reader, worker_writer, 0)))
        forwarding.append(asyncio.create_task(forward(worker_reader, writer, DELAY_SECONDS)))

    async with await asyncio.start_server(connect, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    for task in forwarding:
        task.cancel()
    await asyncio.gather(*forwarding, return_exceptions=True)


def test_client_reaches_a_worker_whose_first_reply_is_delayed() -> None:
    async def test() -> None:
        async with (
            served() as stage,
            delayed_proxy(stage.server.address) as address,
            open_channel(address) as channel,
        ):
            outputs = await RemoteRunner(channel, SERVICE, stage.hosted.contract)(packets(8), RecordedCall().call())
            assert outputs.keys() == {"denoised_latents"}

    run_bounded(test)
