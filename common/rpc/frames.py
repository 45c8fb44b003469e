"""The bytes of a Chunk frame, read and written without a copy of the payload that protobuf would make twice.

Every stage RPC spells `oneof frame { header = 1; chunk = 2 }` and Chunk spells `path = 1, offset = 2, data = 3`
(common.rpc.method checks that), so a chunk frame has the same bytes whichever RPC it belongs to: what one stage sends
is what the next one reads, and the coordinator hands frames on as they came. A frame that is laid out in another
order (other protobuf writers may) is not an error: `read_chunk` returns None and the caller parses it as usual.
"""

from __future__ import annotations

from typing import NamedTuple

CHUNK_BYTES = 1 << 20
"""Largest payload of one chunk."""
INLINE_BYTES = 64 << 10
"""Largest tensor that rides inside its header."""
INLINE_TOTAL_BYTES = 1 << 20
"""Most bytes of tensors that an artifact puts inside its header; the rest follows in chunks, however small."""

_FRAME_CHUNK = 0x12  # field 2, length-delimited
_CHUNK_PATH = 0x0A  # field 1, length-delimited
_CHUNK_OFFSET = 0x10  # field 2, varint
_CHUNK_DATA = 0x1A  # field 3, length-delimited
_MAX_VARINT = 10

Data = bytes | memoryview


class ChunkView(NamedTuple):
    """A chunk whose data still lies in the frame it came in. `frame` is empty when the frame cannot be sent on."""

    path: str
    offset: int
    data: Data
    frame: bytes = b""


def chunk_frame(path: str, offset: int, data: Data) -> bytes:
    """The serialised frame of a chunk; copies data once, into the result."""
    key = path.encode()
    head = b"".join(
        (
            b"\x0a",
            _varint(len(key)),
            key,
            b"\x10" + _varint(offset) if offset else b"",
            b"\x1a",
            _varint(len(data)),
        )
    )
    return b"".join((b"\x12", _varint(len(head) + len(data)), head, data))


def read_chunk(raw: bytes) -> ChunkView | None:
    """The chunk in a frame, as a view into it; None when the frame is something else or laid out otherwise."""
    try:
        if raw[0] != _FRAME_CHUNK:
            return None
        size, at = _read_varint(raw, 1)
        if at + size != len(raw) or raw[at] != _CHUNK_PATH:
            return None
        size, at = _read_varint(raw, at + 1)
        if at + size >= len(raw):
            return None
        path, at = raw[at : at + size].decode(), at + size
        offset = 0
        if raw[at] == _CHUNK_OFFSET:
            offset, at = _read_varint(raw, at + 1)
        if raw[at] != _CHUNK_DATA:
            return None
        size, at = _read_varint(raw, at + 1)
    except (IndexError, UnicodeDecodeError):
        return None
    if at + size != len(raw) or offset >= 1 << 64:
        return None
    return ChunkView(path, offset, memoryview(raw)[at:], raw)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(raw: bytes, at: int) -> tuple[int, int]:
    """The number at `at` and the place after it. Raises IndexError where none ends."""
    value = 0
    for position in range(_MAX_VARINT):
        byte = raw[at + position]
        value |= (byte & 0x7F) << 7 * position
        if byte < 0x80:
            return value, at + position + 1
    raise IndexError("varint of more than ten bytes")
