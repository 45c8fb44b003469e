"""Encodes and decodes Chunk frames without the two copies of the payload that protobuf would make.

All stage RPCs have `oneof frame { header = 1; chunk = 2 }`, which common.rpc.method checks, and Chunk has
`path = 1, offset = 2, data = 3`. A chunk frame therefore has the same bytes in all RPCs, and the coordinator forwards
frames unchanged. Other protobuf libraries may write the fields in another order: read_chunk() then returns None, and
the caller parses the frame with protobuf.
"""

from __future__ import annotations

from typing import NamedTuple

CHUNK_BYTES = 1 << 20
"""Maximum payload of one chunk, in bytes."""
INLINE_BYTES = 64 << 10
"""Maximum size of an inline tensor, in bytes."""
INLINE_TOTAL_BYTES = 1 << 20
"""Maximum total size of the inline tensors of an artifact, in bytes. Further tensors are sent in chunks."""

_FRAME_CHUNK = 0x12  # field 2, length-delimited
_CHUNK_PATH = 0x0A  # field 1, length-delimited
_CHUNK_OFFSET = 0x10  # field 2, varint
_CHUNK_DATA = 0x1A  # field 3, length-delimited
_MAX_VARINT = 10

Data = bytes | memoryview


class ChunkView(NamedTuple):
    """A chunk whose data is a view of its frame. `frame` is empty if the frame cannot be forwarded."""

    path: str
    offset: int
    data: Data
    frame: bytes = b""


def chunk_frame(path: str, offset: int, data: Data) -> bytes:
    """Return the serialized frame of a chunk. Copies `data` once."""
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
    """Return the chunk in a frame, as a view; None for another frame or another field order."""
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
    """Return the varint at the offset `at`, and the offset after it. Raises IndexError for a truncated varint."""
    value = 0
    for position in range(_MAX_VARINT):
        byte = raw[at + position]
        value |= (byte & 0x7F) << 7 * position
        if byte < 0x80:
            return value, at + position + 1
    raise IndexError("varint of more than ten bytes")
