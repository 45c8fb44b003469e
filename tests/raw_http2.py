"""A raw HTTP/2 client (RFC 9113 and 7541), for frames that no gRPC library sends."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

Header = tuple[bytes, bytes]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADERS, _RST_STREAM, _SETTINGS = 1, 3, 4
_END_STREAM, _END_HEADERS = 1, 4


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Encode a frame."""
    return struct.pack(">I", len(payload))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


SETTINGS_ACK = frame(_SETTINGS, 1, 0, b"")
"""The SETTINGS acknowledgement that a server sends at the end of the handshake."""


def call_headers(path: bytes, more: Sequence[Header] = (), *, stream: int = 1, ended: bool = False) -> bytes:
    """A HEADERS frame that starts a call, with literal fields. Names and values are shorter than 127 bytes."""
    fields = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path),
        (b":authority", b"fleet"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        *more,
    )
    block = b"".join(b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value for name, value in fields)
    return frame(_HEADERS, _END_HEADERS | (_END_STREAM if ended else 0), stream, block)


def cancellation(stream: int) -> bytes:
    """An RST_STREAM frame that cancels a call."""
    return frame(_RST_STREAM, 0, stream, struct.pack(">I", 8))


class RawConnection:
    """A connection over which a test sends arbitrary bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, *frames: bytes) -> None:
        """Send bytes and wait until the buffer is drained."""
        self._writer.write(b"".join(frames))
        await self._writer.drain()

    async def greet(self) -> None:
        """Send the client connection preface."""
        await self.send(PREFACE, frame(_SETTINGS, 0, 0, b""))

    async def until(self, *patterns: bytes) -> bytes:
        """Read until the received bytes contain one of `patterns`; returns all received bytes."""
        got = b""
        while not any(pattern in got for pattern in patterns):
            data = await self._reader.read(1 << 16)
            assert data, f"the connection ended after {got!r}"
            got += data
        return got

    async def until_closed(self) -> bytes:
        """Read until the peer closes the connection; returns all received bytes."""
        try:
            return await self._reader.read()
        except ConnectionResetError:
            return b""


@asynccontextmanager
async def raw_connection(address: str) -> AsyncIterator[RawConnection]:
    """A connection to 127.0.0.1:PORT, or unix:PATH."""
    if address.startswith("unix:"):
        reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
    else:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield RawConnection(reader, writer)
    finally:
        writer.close()
