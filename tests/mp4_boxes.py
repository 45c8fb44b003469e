"""Reads the boxes of MP4 files (ISO/IEC 14496-12), and the encoder options that x264 writes into them."""

from __future__ import annotations

from collections.abc import Iterator


def boxes(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield (type, content) of the top-level boxes of a file or a container box. Asserts that they fill `data`."""
    offset = 0
    while offset < len(data):
        size = int.from_bytes(data[offset : offset + 4])
        assert 8 <= size <= len(data) - offset
        yield data[offset + 4 : offset + 8].decode(), data[offset + 8 : offset + size]
        offset += size


def box_types(data: bytes) -> list[str]:
    """Types of the top-level boxes, in order."""
    return [kind for kind, _ in boxes(data)]


def box(data: bytes, *path: str) -> bytes:
    """Content of the only box at a path of box types."""
    for name in path:
        (data,) = [content for kind, content in boxes(data) if kind == name]
    return data


def x264_options(data: bytes) -> set[str]:
    """Options, as name=value, that x264 writes into the first frame of a video."""
    options = data[data.index(b"options: ") :].partition(b"\0")[0]
    return set(options.decode().split())
