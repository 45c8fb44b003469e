"""Fuzz targets behind a real server: every RPC of the fleet, health, reflection, and the connection."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
from fuzz_frames import framed_seeds
from fuzz_inputs import Frames
from fuzz_ranks import rank_targets
from fuzz_targets import PUBLIC, PUBLIC_SEEDS, SERVICES, Target, public_service, stage_servicer, targets
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from async_tests import HANG_SECONDS
from common.rpc.client import open_channel
from common.rpc.fleet_server import FleetServer
from common.rpc.method import request_type, stage_method
from common.rpc.options import ServerLimits
from fleet.v1 import worker_pb2, worker_pb2_grpc
from models.catalog import open_model
from models.registry import load_registry
from raw_http2 import PREFACE, SETTINGS_ACK, call_headers, cancellation, frame, raw_connection
from services.worker_server import WorkerService

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"]
REFLECTION = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"]
WORKER = worker_pb2.DESCRIPTOR.services_by_name["WorkerService"]

_WATCH = "/grpc.health.v1.Health/Watch"
# Status codes that no call may return. DEADLINE_EXCEEDED: the server has not replied in time.
_DEFECTS = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DEADLINE_EXCEEDED}


@contextlib.contextmanager
def all_targets(directory: Path) -> Iterator[list[Target]]:
    """Yield the targets of fuzz_targets, fuzz_ranks and this module."""
    with targets(directory) as without, live_targets() as live:
        yield [*without, *rank_targets(), *live]


@contextlib.contextmanager
def live_targets() -> Iterator[list[Target]]:
    """Run a server with every service of the fleet in the block; yields its targets."""
    loop = asyncio.new_event_loop()
    with contextlib.closing(loop), ThreadPoolExecutor(1) as device, tempfile.TemporaryDirectory() as directory:
        live = loop.run_until_complete(_Live.start(f"unix:{directory}/fuzz.sock", device))
        try:
            yield [*_call_targets(live, loop), _connection_target(live, loop)]
        finally:
            loop.run_until_complete(live.stop())
            loop.run_until_complete(loop.shutdown_asyncgens())


class _Live:
    """The server, and a channel to it."""

    def __init__(self, server: FleetServer, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.channel = channel

    @classmethod
    async def start(cls, listen: str, device: ThreadPoolExecutor) -> _Live:
        server = FleetServer(listen, limits=ServerLimits(request_seconds=HANG_SECONDS, handshake_seconds=HANG_SECONDS))
        server.add(public_service(open_model("emoji", load_registry())).methods, str(PUBLIC.full_name))
        for service in SERVICES:
            servicer = stage_servicer(service, device)
            server.add(servicer.methods, servicer.service_name)
        info = worker_pb2.WorkerInfo(worker_id="fuzz")
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(WorkerService(info), server.grpc_server)
        server.add(None, str(WORKER.full_name))
        await server.start()
        await server.set_ready(True)
        return cls(server, open_channel(server.address))

    async def stop(self) -> None:
        await self.channel.close()
        await self.server.drain(0)

    async def call(self, path: str, frames: Frames) -> None:
        """Send the frames; on the wire, a unary request equals a stream of one message."""
        send: Any = self.channel.stream_stream(path)
        call = send(iter(frames), timeout=HANG_SECONDS)
        code, details = grpc.StatusCode.OK, ""
        try:
            if path == _WATCH:  # runs until the client cancels it
                await call.read()
                call.cancel()
                return
            async for reply in call:
                assert isinstance(reply, bytes)
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), error.details() or ""
        assert code not in _DEFECTS, f"{code}: {details}"
        assert await self.is_well()

    async def is_well(self) -> bool:
        """Whether the server replies to another client."""
        check: Any = self.channel.unary_unary(
            "/grpc.health.v1.Health/Check", response_deserializer=health_pb2.HealthCheckResponse.FromString
        )
        reply = await check(b"", timeout=HANG_SECONDS)
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


def _call_targets(live: _Live, loop: asyncio.AbstractEventLoop) -> Iterator[Target]:
    for method, seeds in _methods():
        name = f"live.{method.containing_service.full_name}.{method.name}"
        yield Target(name, _calling(live, loop, method), seeds, [method.input_type])


def _methods() -> Iterator[tuple[Any, list[Frames]]]:
    """Descriptors of all RPCs, with valid inputs."""
    for method in PUBLIC.methods:
        yield method, [(each.SerializeToString(),) for each in PUBLIC_SEEDS[method.name]]
    for service in SERVICES:
        yield stage_method(service), framed_seeds(request_type(stage_method(service)))
    yield WORKER.methods_by_name["GetModelInfo"], [(b"",)]
    watched = health_pb2.HealthCheckRequest(service="fleet.v1.GenerationService").SerializeToString()
    for check in HEALTH.methods:
        yield check, [(b"",), (watched,)]
    reflection = reflection_pb2.ServerReflectionRequest
    queries = (
        reflection(list_services=""),
        reflection(file_containing_symbol="fleet.v1.WorkerService"),
        reflection(file_by_filename="x"),
    )
    yield REFLECTION.methods[0], [tuple(each.SerializeToString() for each in queries)]


def _calling(live: _Live, loop: asyncio.AbstractEventLoop, method: Any) -> Callable[[Frames], None]:
    path = f"/{method.containing_service.full_name}/{method.name}"

    def run(frames: Frames) -> None:
        loop.run_until_complete(live.call(path, frames if method.client_streaming else (b"".join(frames),)))

    return run


def _connection_target(live: _Live, loop: asyncio.AbstractEventLoop) -> Target:
    """Target of bytes before a call: HTTP/2 frames and headers."""
    ask = call_headers(b"/fleet.v1.GenerationService/ListModels", [(b"authorization", b"Bearer x"), (b"a-bin", b"AA")])
    body = frame(0, 1, 1, b"\0\0\0\0\0")
    odd = call_headers(b"/x/\xff", [(b"grpc-timeout", b"1S")], ended=True)
    ping = frame(6, 0, 0, bytes(8))
    seeds: list[Frames] = [(PREFACE, SETTINGS_ACK, ask, body), (PREFACE, ping, odd), (PREFACE, ask, cancellation(1))]

    async def send(frames: Frames) -> None:
        async with raw_connection(live.server.address) as connection:
            with contextlib.suppress(ConnectionError):
                await connection.greet()
                await connection.send(*frames)
        assert await live.is_well()

    return Target("live.connection", lambda frames: loop.run_until_complete(send(frames)), seeds)
