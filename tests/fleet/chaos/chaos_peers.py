"""Peers that violate the protocol, and clients that do not read: they must not affect other clients."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
from chaos_links import end
from chaos_plan import CALLERS
from chaos_processes import COORDINATOR, Process, credentials

from common.errors import InternalError
from common.rpc.method import path_of, stage_method
from common.rpc.options import CHANNEL_OPTIONS
from common.rpc.status import from_rpc_error, is_sent_by_peer
from fleet.v1 import generation_pb2 as pb
from fleet.v1 import generation_pb2_grpc

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_EMPTY_SETTINGS = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_REPLY_SECONDS = 2.0
_SMALL_WINDOW = (("grpc.http2.lookahead_bytes", 1), ("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1))


class Peers:
    """Half-open connections and unread calls, which stay open until close(). `findings` are unexpected replies."""

    def __init__(self) -> None:
        self.findings: list[str] = []
        self._writers: list[asyncio.StreamWriter] = []
        self._calls: list[Any] = []
        self._channels: list[grpc.aio.Channel] = []

    async def send_malformed(self, process: Process, draw: float) -> str:
        """Send malformed data to a process by a random method; returns the method's description."""
        rng = random.Random(draw)
        methods = (
            self._send_bytes,
            self._send_frames,
            self._stay_half_open,
            self._call_with_bytes,
            self._call_in_silence,
        )
        method = rng.choice(methods)
        with suppress(OSError):  # the process may have exited
            await method(process, rng)
        return method.__name__.strip("_").replace("_", " ")

    async def _send_bytes(self, process: Process, rng: random.Random) -> None:
        """Send random bytes."""
        await _talk(process.socket, [rng.randbytes(rng.randrange(1, 20_000))])

    async def _send_frames(self, process: Process, rng: random.Random) -> None:
        """Send the HTTP/2 preface and frames of random types, streams and lengths."""
        frames = [
            rng.choice((0, 9, 16_384, 0xFFFFFF)).to_bytes(3, "big") + rng.randbytes(6) + rng.randbytes(9)
            for _ in range(20)
        ]
        await _talk(process.socket, [_PREFACE, _EMPTY_SETTINGS, *frames])

    async def _stay_half_open(self, process: Process, rng: random.Random) -> None:
        """Connect, send nothing, a part of the preface or the whole preface, and stay connected."""
        _, writer = await asyncio.open_unix_connection(str(process.socket))
        writer.write(_PREFACE[: rng.choice((0, 10, len(_PREFACE)))])
        self._writers.append(writer)

    async def _call_with_bytes(self, process: Process, rng: random.Random) -> None:
        """Call an existing method with malformed messages."""
        frames = [rng.randbytes(rng.randrange(1, 3_000)) for _ in range(3)]
        async with grpc.aio.insecure_channel(process.target, options=CHANNEL_OPTIONS) as channel:
            try:
                if process.role == COORDINATOR:
                    submit: Any = channel.unary_unary("/fleet.v1.GenerationService/Submit")
                    await submit(frames[0], timeout=_REPLY_SECONDS, metadata=credentials(CALLERS[0]))
                else:
                    stage: Any = channel.stream_stream(path_of(stage_method(process.role.program)))
                    await stage(iter(frames), timeout=_REPLY_SECONDS).read()
            except grpc.aio.AioRpcError as error:
                if is_sent_by_peer(error) and isinstance(from_rpc_error(error), InternalError):
                    self.findings.append(
                        f"{process.name} reports a malformed message as an internal error: {error.details()}"
                    )

    async def _call_in_silence(self, process: Process, _: random.Random) -> None:
        """Start a call without sending a message or half-closing; the call occupies a worker for a while."""
        if process.role == COORDINATOR:
            await self._stay_half_open(process, random.Random(0))
            return
        stage: Any = self._channel(process.target).stream_stream(path_of(stage_method(process.role.program)))
        call = stage()
        self._calls.append(call)
        await call.wait_for_connection()

    def _channel(self, target: str, options: Sequence[tuple[str, int]] = ()) -> grpc.aio.Channel:
        channel = grpc.aio.insecure_channel(target, options=(*CHANNEL_OPTIONS, *options))
        self._channels.append(channel)
        return channel

    def watch_without_reading(self, process: Process, caller: str, request_id: str) -> None:
        """Start a Watch call for a caller's request and read no event."""
        stub: Any = generation_pb2_grpc.GenerationServiceStub(self._channel(process.target, _SMALL_WINDOW))
        self._calls.append(stub.Watch(pb.WatchRequest(request_id=request_id), metadata=credentials(caller)))

    def download_without_reading(self, process: Process, caller: str, request_id: str) -> None:
        """Start a DownloadResult call for a caller's request and read no data."""
        stub: Any = generation_pb2_grpc.GenerationServiceStub(self._channel(process.target, _SMALL_WINDOW))
        request = pb.DownloadResultRequest(request_id=request_id)
        self._calls.append(stub.DownloadResult(request, metadata=credentials(caller)))

    async def close(self) -> None:
        """Close all connections and calls."""
        for call in self._calls:
            call.cancel()
        for channel in self._channels:
            await channel.close()
        for writer in self._writers:
            await end(writer)
        for each in (self._calls, self._channels, self._writers):
            each.clear()  # a referenced call keeps its connection open


async def _talk(socket: Path, pieces: Sequence[bytes]) -> None:
    """Send pieces over a new connection; read until the peer closes it, for at most _REPLY_SECONDS."""
    reader, writer = await asyncio.open_unix_connection(str(socket))
    try:
        for piece in pieces:
            writer.write(piece)
        await writer.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(_REPLY_SECONDS):
                while await reader.read(1 << 16):
                    pass
    finally:
        await end(writer)
