"""Parses the header of image files: format, size, orientation and animation. Does not decode pixels.

The coordinator has no image library. With this parser it rejects a request before admission if an image has an
unsupported format or too many pixels. Errors in the pixel data are detected by the worker that decodes the image.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from common.errors import InvalidInput
from common.image_orientation import SIDEWAYS, UPRIGHT, ImageMetadata

MAX_IMAGES = 16
"""Maximum number of images of one request."""
MAX_FILE_BYTES = 20 * 2**20
MAX_PIXELS = 2**26
"""Maximum number of pixels of one image."""
MAX_TOTAL_PIXELS = 2**27
"""Maximum number of pixels of all images of one request."""
MAX_ASPECT = 64
"""Maximum ratio of the longer side to the shorter side."""

_JPEG_END = b"\xff\xd9"
_PNG = b"\x89PNG\r\n\x1a\n"
_FIRST_PNG_CHUNK = len(_PNG) + 8
_JPEG = b"\xff\xd8\xff"
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xc8\xd0-\xd9\xf0-\xfd\xff])")
"""A marker that is followed by a segment length."""
_JPEG_SCAN = 0xDA
_JPEG_APP1 = 0xE1
_PNG_NAME = re.compile(rb"\w{4}")
_PNG_GRAY_16 = b"\x10\0"
"""Bit depth 16 and color type 0, as in the IHDR chunk."""
_WEBP_FLAGS = {b"EXIF": 0x08, b"XMP ": 0x04}
"""Flags of the VP8X chunk. Decoders ignore a chunk whose flag is not set."""
_JPEG_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_OTHERS = {
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"%PDF": "PDF",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"<svg": "SVG",
    b"<?xml": "XML",
}


@dataclass(frozen=True)
class ImageHeader:
    """Format ("PNG", "JPEG" or "WebP"), size in pixels after `orientation` is applied, and pixel format.

    `orientation` is an EXIF value, 1 to 8. `is_16_bit_gray` is true for PNG files with color type 0 and bit depth 16.
    """

    format: str
    height: int
    width: int
    orientation: int = UPRIGHT
    is_16_bit_gray: bool = False


class _Truncated(Exception):
    """The data ends before the file is complete."""


def read_image_header(role: str, data: bytes | memoryview) -> ImageHeader:
    """Parse the header of an image file. Raises InvalidInput with field `role` for an unsupported or truncated file."""
    view = memoryview(data)
    if not view:
        raise InvalidInput(f"{role} is empty; send a PNG, JPEG or WebP image", field=role)
    if len(view) > MAX_FILE_BYTES:
        most = MAX_FILE_BYTES // 2**20
        raise InvalidInput(f"{role}: {len(view)} bytes are not at most {most} MiB; compress the image", field=role)
    try:
        header = _read(role, view)
    except _Truncated:
        raise InvalidInput(f"{role} is truncated; send the complete file", field=role) from None
    _check_size(role, header)
    return header


def image_order(role: str) -> tuple[str, int]:
    """Return the sort key of an image's role, for the order "image", "image_1" ... "image_10"."""
    name, _, number = role.rpartition("_")
    return (name, int(number)) if number.isdecimal() else (role, 0)


def check_total_size(headers: Mapping[str, ImageHeader]) -> None:
    """Raise InvalidInput if the images of one request have more than MAX_TOTAL_PIXELS pixels in total.

    `headers` are the headers by image role. All images of a request are in memory at the same time, and a file of a few
    KiB can have 2^26 pixels of one color.
    """
    total = sum(header.height * header.width for header in headers.values())
    if total > MAX_TOTAL_PIXELS:
        message = f"images: {total} pixels are not at most {MAX_TOTAL_PIXELS} pixels in total; reduce the images"
        raise InvalidInput(message, field="images")


def _read(role: str, view: memoryview) -> ImageHeader:
    start = bytes(view[:16])
    if start.startswith(_PNG):
        return _read_png(role, view)
    if start.startswith(_JPEG):
        return _read_jpeg(role, view)
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return _read_webp(role, view)
    found = next((f" but {name}" for magic, name in _OTHERS.items() if start.startswith(magic)), "")
    if start[4:8] == b"ftyp":
        found = " but HEIF, AVIF or a video"
    raise InvalidInput(f"{role} is not a PNG, JPEG or WebP image{found}", field=role)


def _check_size(role: str, header: ImageHeader) -> None:
    shown = f"{header.width} x {header.height}"
    if not header.height or not header.width:
        raise InvalidInput(f"{role}: {shown} is not at least 1 x 1 pixel", field=role)
    if header.height * header.width > MAX_PIXELS:
        raise InvalidInput(f"{role}: {shown} is not at most {MAX_PIXELS} pixels; reduce the image", field=role)
    if max(header.height, header.width) > MAX_ASPECT * min(header.height, header.width):
        message = f"{role}: {shown} does not have an aspect ratio of at most {MAX_ASPECT}; crop the image"
        raise InvalidInput(message, field=role)


def _read_png(role: str, view: memoryview) -> ImageHeader:
    width = height = 0
    is_gray = has_data = is_broken = False
    metadata = ImageMetadata(role)
    for kind, begin, end in _png_chunks(view):
        # Pillow stops at a chunk with an invalid name: with an error before the image data, silently after it.
        is_broken |= has_data and not _PNG_NAME.match(kind)
        match kind:
            case b"IHDR" if width or begin != _FIRST_PNG_CHUNK:
                message = f"{role} is not a well-formed PNG: IHDR is not the first chunk or occurs twice"
                raise InvalidInput(message, field=role)
            case b"IHDR":
                width, height = _number(view, begin, 4), _number(view, begin + 4, 4)
                is_gray = bytes(view[begin + 8 : begin + 10]) == _PNG_GRAY_16
            case b"acTL":
                raise _animated(role, "PNG")
            case b"IDAT":
                has_data = True
            case b"IEND":
                break
            case _ if not is_broken:
                metadata.add_png_chunk(kind, bytes(view[begin:end]))
    else:
        raise _Truncated
    return _oriented("PNG", height, width, metadata, is_gray)


def _png_chunks(view: memoryview) -> Iterator[tuple[bytes, int, int]]:
    at = len(_PNG)
    while at < len(view):
        size, kind = _number(view, at, 4), bytes(view[at + 4 : at + 8])
        if at + 12 + size > len(view):
            raise _Truncated
        yield kind, at + 8, at + 8 + size
        at += 12 + size


def _read_jpeg(role: str, view: memoryview) -> ImageHeader:
    """Parse the segments before the first scan. Metadata segments may follow the frame header."""
    at, size = 2, None
    metadata = ImageMetadata(role)
    while True:
        marker, at = _jpeg_marker(view, at)
        length = _number(view, at, 2)
        if marker in _JPEG_FRAMES:
            size = size or (_number(view, at + 3, 2), _number(view, at + 5, 2))
        if marker == _JPEG_APP1:
            metadata.add_jpeg_app1(bytes(view[at + 2 : at + length]))
        if marker == _JPEG_SCAN:
            if size is None or bytes(view[at:]).rfind(_JPEG_END) < 0:
                raise _Truncated
            return _oriented("JPEG", *size, metadata)
        at += max(length, 2)


def _jpeg_marker(view: memoryview, at: int) -> tuple[int, int]:
    """Return the next marker with a length, and the offset of the length. Skips bytes between segments."""
    if found := _JPEG_MARKER.search(view, at):
        return found[1][0], found.end()
    raise _Truncated


def _read_webp(role: str, view: memoryview) -> ImageHeader:
    if len(view) < _number(view, 4, 4, "little") + 8:
        raise _Truncated
    kind = bytes(view[12:16])
    if kind == b"VP8X":
        flags = _number(view, 20, 1)
        if flags & 0x02:
            raise _animated(role, "WebP")
        width, height = (_number(view, at, 3, "little") + 1 for at in (24, 27))
        return _oriented("WebP", height, width, _webp_metadata(role, view, flags))
    if kind == b"VP8L":
        bits = _number(view, 21, 4, "little")
        return ImageHeader("WebP", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    if kind == b"VP8 ":
        width, height = (_number(view, at, 2, "little") & 0x3FFF for at in (26, 28))
        return ImageHeader("WebP", height, width)
    raise _Truncated


def _webp_metadata(role: str, view: memoryview, flags: int) -> ImageMetadata:
    metadata = ImageMetadata(role)
    view = view[: _number(view, 4, 4, "little") + 8]
    at = 12
    while at + 8 <= len(view):
        kind, size = bytes(view[at : at + 4]), _number(view, at + 4, 4, "little")
        if flags & _WEBP_FLAGS.get(kind, 0):
            metadata.add_webp_chunk(kind, bytes(view[at + 8 : at + 8 + size]))
        at += 8 + size + size % 2
    return metadata


def _oriented(name: str, height: int, width: int, metadata: ImageMetadata, is_16_bit_gray: bool = False) -> ImageHeader:
    orientation = metadata.orientation()
    if orientation in SIDEWAYS:
        height, width = width, height
    return ImageHeader(name, height, width, orientation, is_16_bit_gray)


def _animated(role: str, name: str) -> InvalidInput:
    return InvalidInput(f"{role} is an animated {name}; send a single image", field=role)


def _number(view: memoryview, at: int, size: int, order: str = "big") -> int:
    piece = bytes(view[at : at + size])
    if len(piece) < size:
        raise _Truncated
    return int.from_bytes(piece, "little" if order == "little" else "big")
