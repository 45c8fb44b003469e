"""Tells what a picture is from the first bytes of its file: format, size, and whether it moves. Decodes nothing.

So a request whose picture is no picture, or is too large to decode, is refused before it is accepted, by processes
that have no image library. What the bytes behind the header hold is seen only where they are decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from common.errors import InvalidInput

MAX_FILE_BYTES = 20 * 2**20
MAX_PIXELS = 2**26
MAX_TOTAL_PIXELS = 2**27
MAX_ASPECT = 64

_EXIF_ORIENTATION = 0x0112
_JPEG_END = b"\xff\xd9"
_PNG = b"\x89PNG\r\n\x1a\n"
_FIRST_PNG_CHUNK = len(_PNG) + 8
_JPEG = b"\xff\xd8\xff"
_JPEG_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD8)}
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
    """Format ("PNG", "JPEG" or "WebP"), and size in pixels as it is shown, after the turn that EXIF may ask for."""

    format: str
    height: int
    width: int


class _Truncated(Exception):
    """The file goes on behind the end of the data."""


def read_image_header(role: str, data: bytes | memoryview) -> ImageHeader:
    """Read the header of a picture file. Raises InvalidInput about `role` for what is no picture that can be taken."""
    view = memoryview(data)
    if not view:
        raise InvalidInput(f"{role} is empty; it must be a PNG, JPEG or WebP picture", field=role)
    if len(view) > MAX_FILE_BYTES:
        most = MAX_FILE_BYTES // 2**20
        raise InvalidInput(f"{role} must be at most {most} MiB, but has {len(view)} bytes", field=role)
    try:
        header = _read(role, view)
    except _Truncated:
        raise InvalidInput(f"{role} is cut off: the file is not whole", field=role) from None
    _check_size(role, header)
    return header


def check_total_size(headers: Mapping[str, ImageHeader]) -> None:
    """Raise InvalidInput when the pictures of one request, by role, have too many pixels together.

    A few KiB can hold 2^26 pixels of one colour, and all pictures of a request are open at a time.
    """
    total = sum(header.height * header.width for header in headers.values())
    if total > MAX_TOTAL_PIXELS:
        message = f"the pictures must have at most {MAX_TOTAL_PIXELS} pixels together, but have {total}"
        raise InvalidInput(message, field="images")


def _read(role: str, view: memoryview) -> ImageHeader:
    start = bytes(view[:16])
    if start.startswith(_PNG):
        return _read_png(role, view)
    if start.startswith(_JPEG):
        return _read_jpeg(view)
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return _read_webp(role, view)
    found = next((f" but {name}" for magic, name in _OTHERS.items() if start.startswith(magic)), "")
    if start[4:8] == b"ftyp":
        found = " but HEIF, AVIF or a video"
    raise InvalidInput(f"{role} is not a PNG, JPEG or WebP picture{found}", field=role)


def _check_size(role: str, header: ImageHeader) -> None:
    shown = f"{header.width} x {header.height}"
    if not header.height or not header.width:
        raise InvalidInput(f"{role} has no pixels: it is {shown}", field=role)
    if header.height * header.width > MAX_PIXELS:
        raise InvalidInput(f"{role} must have at most {MAX_PIXELS} pixels, but is {shown}", field=role)
    if max(header.height, header.width) > MAX_ASPECT * min(header.height, header.width):
        message = f"{role} may be at most {MAX_ASPECT} times as long as it is wide, but is {shown}"
        raise InvalidInput(message, field=role)


def _read_png(role: str, view: memoryview) -> ImageHeader:
    width = height = orientation = 0
    for kind, begin, end in _png_chunks(view):
        match kind:
            case b"IHDR" if width or begin != _FIRST_PNG_CHUNK:
                raise InvalidInput(f"{role} is not a well-formed PNG: its header must come first, and once", field=role)
            case b"IHDR":
                width, height = _number(view, begin, 4), _number(view, begin + 4, 4)
            case b"acTL":
                raise _moving(role, "PNG")
            case b"eXIf":
                orientation = _orientation(view[begin:end])
            case b"IEND":
                break
    else:
        raise _Truncated
    return _turned("PNG", height, width, orientation)


def _png_chunks(view: memoryview) -> Iterator[tuple[bytes, int, int]]:
    at = len(_PNG)
    while at < len(view):
        size, kind = _number(view, at, 4), bytes(view[at + 4 : at + 8])
        if at + 12 + size > len(view):
            raise _Truncated
        yield kind, at + 8, at + 8 + size
        at += 12 + size


def _read_jpeg(view: memoryview) -> ImageHeader:
    at, orientation = 2, 0
    while True:
        marker, at = _jpeg_marker(view, at)
        if marker in _JPEG_WITHOUT_LENGTH:
            continue
        size = _number(view, at, 2)
        if marker in _JPEG_FRAMES:
            if bytes(view[at:]).rfind(_JPEG_END) < 0:
                raise _Truncated
            return _turned("JPEG", _number(view, at + 3, 2), _number(view, at + 5, 2), orientation)
        if marker == 0xE1 and bytes(view[at + 2 : at + 8]) == b"Exif\0\0":
            orientation = _orientation(view[at + 8 : at + size])
        at += max(size, 2)


def _jpeg_marker(view: memoryview, at: int) -> tuple[int, int]:
    """The next marker, and where its data begins. Fill bytes may stand before it."""
    while _number(view, at, 1) == 0xFF:
        at += 1
        if (marker := _number(view, at, 1)) not in (0xFF, 0):
            return marker, at + 1
    raise _Truncated


def _read_webp(role: str, view: memoryview) -> ImageHeader:
    if len(view) < _number(view, 4, 4, "little") + 8:
        raise _Truncated
    kind = bytes(view[12:16])
    if kind == b"VP8X":
        if _number(view, 20, 1) & 0x02:
            raise _moving(role, "WebP")
        width, height = (_number(view, at, 3, "little") + 1 for at in (24, 27))
        return _turned("WebP", height, width, _webp_orientation(view))
    if kind == b"VP8L":
        bits = _number(view, 21, 4, "little")
        return ImageHeader("WebP", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    if kind == b"VP8 ":
        width, height = (_number(view, at, 2, "little") & 0x3FFF for at in (26, 28))
        return ImageHeader("WebP", height, width)
    raise _Truncated


def _webp_orientation(view: memoryview) -> int:
    at = 12
    while at + 8 <= len(view):
        size = _number(view, at + 4, 4, "little")
        if bytes(view[at : at + 4]) == b"EXIF":
            return _orientation(view[at + 8 : at + 8 + size])
        at += 8 + size + size % 2
    return 0


def _orientation(exif: memoryview) -> int:
    """The value of EXIF's orientation entry; 0 where there is none, or where it cannot be read."""
    if bytes(exif[:6]) == b"Exif\0\0":
        exif = exif[6:]
    order = {b"II": "little", b"MM": "big"}.get(bytes(exif[:2]))
    if order is None:
        return 0
    try:
        directory = _number(exif, 4, 4, order)
        for entry in range(_number(exif, directory, 2, order)):
            at = directory + 2 + 12 * entry
            if _number(exif, at, 2, order) == _EXIF_ORIENTATION:
                return _number(exif, at + 8, 2, order)
    except _Truncated:
        pass
    return 0


def _turned(name: str, height: int, width: int, orientation: int) -> ImageHeader:
    """Orientations 5 to 8 lie on their side."""
    return ImageHeader(name, width, height) if 5 <= orientation <= 8 else ImageHeader(name, height, width)


def _moving(role: str, name: str) -> InvalidInput:
    return InvalidInput(f"{role} is an animated {name}; it must be a single picture", field=role)


def _number(view: memoryview, at: int, size: int, order: str = "big") -> int:
    piece = bytes(view[at : at + size])
    if len(piece) < size:
        raise _Truncated
    return int.from_bytes(piece, "little" if order == "little" else "big")
