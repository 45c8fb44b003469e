"""Servers survive silent connections, calls without requests, and malformed paths and metadata."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from async_tests import HANG_SECONDS, run_bounded, wait_until
from certificates import Authority
from common.errors import Unauthenticated
from common.rpc.client import open_channel
from common.rpc.fleet_server import FleetServer
from common.rpc.interceptor import Admit, admit_all
from common.rpc.options import ServerLimits
from common.rpc.tls import ServerIdentity, read_authority, read_identity, server_credentials
from coordinator_fleet import FakeFleet, emoji, running_fleet
from fleet.v1 import generation_pb2 as pb
from raw_http2 import SETTINGS_ACK, RawConnection, call_headers, cancellation, raw_connection

PATH = b"/fleet.v1.TestService/Ask"
CHECK = b"/grpc.health.v1.Health/Check"
SERVICE = "fleet.v1.TestService"
NUM_CALLS = 200


class EchoService:
    """A service with one method, which returns its request once the gate is open."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.methods: dict[str, Any] = {"Ask": grpc.unary_unary_rpc_method_handler(self._echo)}

    async def _echo(self, request: bytes, _: object) -> bytes:
        self.num_calls += 1
        await self.gate.wait()
        return request


@asynccontextmanager
async def served(
    limits: ServerLimits | None = None,
    *,
    admit: Admit = admit_all,
    credentials: grpc.ServerCredentials | None = None,
) -> AsyncIterator[tuple[FleetServer, EchoService]]:
    server = FleetServer("127.0.0.1:0", limits=limits, admit=admit, credentials=credentials)
    echo = EchoService()
    server.add(echo.methods, SERVICE)
    await server.start()
    await server.set_ready(True)
    try:
        yield server, echo
    finally:
        echo.gate.set()
        await server.drain(0)


async def serves_valid_clients(server: FleetServer) -> bool:
    """Whether the server replies to a valid client on a new connection."""
    async with open_channel(server.address) as channel:
        check: Any = channel.unary_unary(
            CHECK.decode(), response_deserializer=health_pb2.HealthCheckResponse.FromString
        )
        ask: Any = channel.unary_unary(PATH.decode())
        status = (await check(b"", timeout=10)).status
        reply = await ask(b"hello", timeout=10)
    return bool(status == health_pb2.HealthCheckResponse.SERVING and reply == b"hello")


def status_trailer(code: grpc.StatusCode) -> bytes:
    """The encoded grpc-status trailer of a call, if it is the first call of its connection."""
    number = str(code.value[0]).encode()
    return b"grpc-status" + bytes((len(number),)) + number


@asynccontextmanager
async def greeted(address: str) -> AsyncIterator[RawConnection]:
    """A connection after the HTTP/2 handshake."""
    async with raw_connection(address) as connection:
        await connection.greet()
        await connection.until(SETTINGS_ACK)
        yield connection


@pytest.mark.parametrize("path", [b"/x/\xff", b"\xff\xfe", b"/fleet.v1.TestService/Ask\xc3", b"/", b"/fleet.v1.X/Y"])
def test_server_survives_unknown_and_invalid_paths(path: bytes) -> None:
    """Without common.rpc.grpcio_patch, a path that is not UTF-8 stops the server of grpcio 1.85."""

    async def test() -> None:
        async with served() as (server, _):
            for _ in range(3):
                async with raw_connection(server.address) as connection:
                    await connection.greet()
                    await connection.send(call_headers(path, ended=True))
                    await connection.until(status_trailer(grpc.StatusCode.UNIMPLEMENTED))
            assert await serves_valid_clients(server)

    run_bounded(test)


@pytest.mark.parametrize(
    "header",
    [
        (b"x-text", b"\xff\xfe"),
        (b"x-file-bin", b"!!!"),
        (b"grpc-timeout", b"99999999999H"),
        (b"grpc-timeout", b"-1S"),
        (b"grpc-encoding", b"none-such"),
        (b"authorization", b"Bearer \xff"),
        (b"content-type", b"\x00"),
    ],
)
def test_server_survives_invalid_metadata(header: tuple[bytes, bytes]) -> None:
    async def test() -> None:
        async with served() as (server, _):
            for path in (PATH, CHECK):
                async with raw_connection(server.address) as connection:
                    await connection.greet()
                    await connection.send(call_headers(path, [header]), cancellation(1))
            assert await serves_valid_clients(server)
            await wait_until(lambda: not server.gate.in_flight)

    run_bounded(test)


def test_many_calls_of_unknown_methods_are_refused() -> None:
    async def test() -> None:
        async with served() as (server, _), open_channel(server.address) as channel:
            ask: Any = channel.unary_unary("/fleet.v1.TestService/Unknown")
            codes = await asyncio.gather(*(ask(b"").code() for _ in range(NUM_CALLS)))
            assert set(codes) == {grpc.StatusCode.UNIMPLEMENTED}
            assert await serves_valid_clients(server)

    run_bounded(test)


def credentials_of(authority: Authority) -> grpc.ServerCredentials:
    issued = authority.issue("worker")
    identity = read_identity(issued.cert, issued.key)
    assert identity is not None
    identity_and_authority = ServerIdentity(identity, read_authority(authority.ca))
    return server_credentials(lambda: (1, identity_and_authority))


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00\x01\x00", b"PRI * HTTP/2.0\r\n"])
def test_incomplete_handshake_times_out(tls: bool, sent: bytes, tmp_path: Path) -> None:
    limits = ServerLimits(handshake_seconds=0.2)

    async def test() -> None:
        credentials = credentials_of(Authority(tmp_path)) if tls else None
        async with served(limits, credentials=credentials) as (server, _), AsyncExitStack() as stack:
            connections = [await stack.enter_async_context(raw_connection(server.address)) for _ in range(20)]
            for connection in connections:
                await connection.send(sent)
            for connection in connections:
                await connection.until_closed()

    run_bounded(test)


def test_only_idle_connections_are_closed() -> None:
    limits = ServerLimits(connection_idle_seconds=0.2)

    async def test() -> None:
        async with served(limits) as (server, echo), open_channel(server.address) as channel:
            echo.gate.clear()
            ask: Any = channel.unary_unary(PATH.decode())
            call = ask(b"hello")
            await wait_until(lambda: bool(echo.num_calls))
            async with greeted(server.address) as idle:
                await idle.until_closed()
            echo.gate.set()
            assert await call == b"hello"

    run_bounded(test)


def test_number_of_connections_is_bounded() -> None:
    async def test() -> None:
        async with served(ServerLimits(connections=3)) as (server, _):
            async with AsyncExitStack() as stack:
                for _ in range(3):
                    await stack.enter_async_context(greeted(server.address))
                for _ in range(20):
                    async with raw_connection(server.address) as excess:
                        assert await excess.until_closed() == b""
            while True:  # the server notices closed connections after a delay
                try:
                    assert await serves_valid_clients(server)
                except grpc.aio.AioRpcError:
                    continue
                break

    run_bounded(test)


@pytest.mark.parametrize("path", [PATH, CHECK])
def test_call_without_a_request_times_out(path: bytes) -> None:
    async def test() -> None:
        async with served(ServerLimits(request_seconds=0.2)) as (server, echo):
            async with raw_connection(server.address) as connection:
                await connection.greet()
                await connection.send(call_headers(path))
                received = await connection.until(status_trailer(grpc.StatusCode.DEADLINE_EXCEEDED))
                assert b"no request was received for 0.2 s" in received
            assert not echo.num_calls

            async def serves() -> bool:
                try:
                    return await serves_valid_clients(server)
                except grpc.aio.AioRpcError as error:  # a request may take longer than 0.2 s
                    if error.code() != grpc.StatusCode.DEADLINE_EXCEEDED:
                        raise
                    return False

            await wait_until(serves)

    run_bounded(test)


@pytest.mark.parametrize("path", [PATH, CHECK])
def test_call_that_ends_without_a_request_is_refused(path: bytes) -> None:
    async def test() -> None:
        async with served() as (server, echo):
            async with raw_connection(server.address) as connection:
                await connection.greet()
                await connection.send(call_headers(path, ended=True))
                await connection.until(status_trailer(grpc.StatusCode.INVALID_ARGUMENT))
            assert not echo.num_calls
            assert await serves_valid_clients(server)

    run_bounded(test)


def test_calls_without_a_request_count_towards_the_bound_on_calls() -> None:
    async def test() -> None:
        async with served(ServerLimits(calls=5)) as (server, _):
            async with raw_connection(server.address) as connection:
                await connection.greet()
                await connection.send(*(call_headers(PATH, stream=number) for number in range(1, 11, 2)))
                await wait_until(lambda: server.gate.in_flight == 5)
                async with raw_connection(server.address) as excess:
                    await excess.greet()
                    await excess.send(call_headers(PATH))
                    await excess.until(status_trailer(grpc.StatusCode.RESOURCE_EXHAUSTED))
            await wait_until(lambda: not server.gate.in_flight)
            assert await serves_valid_clients(server)

    run_bounded(test)


def refuse(_: object) -> None:
    raise Unauthenticated("the caller is unknown")


def test_unauthenticated_call_is_refused_before_its_request_is_read() -> None:
    async def test() -> None:
        async with served(admit=refuse) as (server, echo):
            async with raw_connection(server.address) as connection:
                await connection.greet()
                await connection.send(call_headers(PATH))
                await connection.until(status_trailer(grpc.StatusCode.UNAUTHENTICATED))
            async with open_channel(server.address) as channel:
                ask: Any = channel.unary_unary(PATH.decode())
                for size in (1, 15 << 20):
                    call = ask(bytes(size))
                    assert await call.code() == grpc.StatusCode.UNAUTHENTICATED
                    assert await call.details() == "the caller is unknown"
            assert not echo.num_calls

    run_bounded(test)


def test_server_recovers_from_many_cancelled_calls() -> None:
    async def test() -> None:
        async with served() as (server, _):
            async with raw_connection(server.address) as connection:
                await connection.greet()
                for start in range(1, 2_000, 100):
                    numbers = range(start, start + 100, 2)
                    await connection.send(*(call_headers(PATH, stream=each) + cancellation(each) for each in numbers))
            assert await serves_valid_clients(server)
            await wait_until(lambda: not server.gate.in_flight)

    run_bounded(test)


def test_coordinator_bounds_its_connections(store_url: str) -> None:
    async def scenario(running: FakeFleet) -> None:
        coordinator, stub = await running.add_coordinator(listen="127.0.0.1:0", max_connections=2)
        assert await stub.ListModels(pb.ListModelsRequest())
        async with greeted(coordinator.address), raw_connection(coordinator.address) as excess:
            assert await excess.until_closed() == b""
        assert await stub.ListModels(pb.ListModelsRequest())

    async def main() -> None:
        async with asyncio.timeout(HANG_SECONDS), running_fleet(store_url, emoji()) as running:
            await scenario(running)

    asyncio.run(main())
