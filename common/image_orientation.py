"""The orientation of an image file, from its EXIF and XMP metadata.

The rules are those of Pillow's ImageOps.exif_transpose. The header reader and the decoder both use this module, so they
agree on the size of an image. Pure Python: the coordinator has no image library. Differs from Pillow in two cases. In
a PNG or WebP file, Pillow raises an error for EXIF data that is not a TIFF file; here such an image is not rotated.
Images with more metadata than the limits below are rejected.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator

from common.errors import InvalidInput

UPRIGHT = 1
SIDEWAYS = range(5, 9)
"""Orientations that exchange height and width."""

_TAG = 0x0112
_ENTRY_BYTES = 12
_INLINE_BYTES = 4
_EXIF_START = b"Exif\0\0"
_EXIF_PREFIX = re.compile(rb"^(Exif\0\0){1,2}")
_XMP = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
_JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II\0*", b"MM*\0", b"MM\0+")
# TIFF types that Pillow reads: size of one value in bytes, and its struct format, empty for values without a format.
_TYPES: dict[int, tuple[int, str]] = {
    1: (1, ""),
    2: (1, ""),
    3: (2, "H"),
    4: (4, "L"),
    5: (8, "LL"),
    6: (1, "b"),
    7: (1, ""),
    8: (2, "h"),
    9: (4, "l"),
    10: (8, "ll"),
    11: (4, "f"),
    12: (8, "d"),
    13: (4, "L"),
    16: (8, "Q"),
}
_EXIF, _RAW_EXIF, _XMP_TEXT, _XMP_BYTES = "exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"
_PNG_KEYS = {key.encode(): key for key in (_EXIF, _RAW_EXIF, _XMP_TEXT, _XMP_BYTES)}
_MAX_TEXT_BYTES = 2**20
"""Maximum size in bytes of one decompressed PNG text chunk. Pillow has the same limit."""
_MAX_ALL_TEXT_BYTES = 2**23
"""Maximum total size in bytes of an image's decompressed PNG text chunks with metadata."""
_MAX_EXIF_SEGMENTS = 256
"""Maximum number of EXIF segments of one JPEG file. For each segment, Pillow copies all earlier segments."""


class ImageMetadata:
    """Metadata of one image file that may contain an orientation, added in file order."""

    def __init__(self, role: str) -> None:
        self._role = role
        self._info: dict[str, bytes] = {}
        self._decompressed_bytes = 0
        self._exif_segments = 0

    def add_jpeg_app1(self, data: bytes) -> None:
        """Add an APP1 segment, without its length. EXIF segments are concatenated; the last XMP segment is used."""
        if data.startswith(_EXIF_START):
            self._exif_segments += 1
            if self._exif_segments > _MAX_EXIF_SEGMENTS:
                raise self._too_large(f"more than {_MAX_EXIF_SEGMENTS} EXIF segments")
            self._info[_EXIF] = self._info.get(_EXIF, _EXIF_START) + data.removeprefix(_EXIF_START)
        elif data.startswith(_JPEG_XMP):
            self._info[_XMP_BYTES] = data.removeprefix(_JPEG_XMP)

    def add_webp_chunk(self, kind: bytes, data: bytes) -> None:
        """Add a chunk of an extended WebP file. The first chunk of each kind is used."""
        if key := {b"EXIF": _EXIF, b"XMP ": _XMP_BYTES}.get(kind):
            self._info.setdefault(key, data)

    def add_png_chunk(self, kind: bytes, data: bytes) -> None:
        """Add a PNG chunk. The last chunk of each key is used. Raises InvalidInput for too much decompressed text."""
        if kind == b"eXIf":
            self._info[_EXIF] = _EXIF_START + data
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            return
        name, _, rest = data.partition(b"\0")
        if not (key := _PNG_KEYS.get(name)):
            return
        if kind == b"tEXt":
            self._info[key] = rest
        elif kind == b"zTXt":
            self._info[key] = self._decompressed(rest[1:]) or b""
        else:
            self._add_international_text(key, rest)

    def orientation(self) -> int:
        """Return the orientation, 1 to 8; 1 if the metadata has none. EXIF takes precedence over XMP."""
        try:
            found = _exif_orientation(self._exif())
        except ValueError:
            return UPRIGHT
        if found is None:
            match = _XMP.search(self._info.get(_XMP_TEXT) or self._info.get(_XMP_BYTES, b""))
            found = int(match[1]) if match else UPRIGHT
        return found if found in range(1, 9) else UPRIGHT

    def _exif(self) -> bytes:
        """Return the TIFF file in the EXIF data. ImageMagick writes hexadecimal PNG text after three header lines."""
        if (data := self._info.get(_EXIF)) is None:
            lines = self._info.get(_RAW_EXIF, b"").split(b"\n")[3:]
            data = bytes.fromhex(b"".join(lines).decode("latin-1"))
        return _EXIF_PREFIX.sub(b"", data)

    def _add_international_text(self, key: str, rest: bytes) -> None:
        compressed, method = rest[:1] != b"\0", rest[1:2]
        fields = rest[2:].split(b"\0", 2)
        if len(fields) < 3 or (compressed and method != b"\0"):
            return
        language, translated, value = fields
        text = self._decompressed(value) if compressed else value
        if text is None:
            return
        if key == _XMP_TEXT:
            self._info[_XMP_BYTES] = text
        if all(_is_utf8(each) for each in (language, translated, text)):
            self._info[key] = text

    def _decompressed(self, data: bytes) -> bytes | None:
        """Return the decompressed text; None for data that zlib rejects. Never expands beyond the limits."""
        decompressor = zlib.decompressobj()
        try:
            text = decompressor.decompress(data, _MAX_TEXT_BYTES)
            is_too_large = bool(decompressor.unconsumed_tail)
        except zlib.error:
            text, is_too_large = None, False
        # zlib may expand data up to the limit before it rejects the data.
        self._decompressed_bytes += _MAX_TEXT_BYTES if text is None else len(text)
        if is_too_large or self._decompressed_bytes > _MAX_ALL_TEXT_BYTES:
            most = f"{_MAX_TEXT_BYTES} bytes in one chunk or {_MAX_ALL_TEXT_BYTES} bytes in total"
            raise self._too_large(f"compressed metadata that expands to more than {most}")
        return text

    def _too_large(self, found: str) -> InvalidInput:
        return InvalidInput(f"{self._role} has {found}; save it without metadata", field=self._role)


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _exif_orientation(tiff: bytes) -> int | None:
    """Return the orientation entry of a TIFF file; 0 for a value outside 1 to 8, None without an entry.

    Raises ValueError for data that is not a TIFF file.
    """
    if not tiff:
        return None
    if not tiff.startswith(_TIFF_STARTS) or len(tiff) < 8:
        raise ValueError("EXIF data is not a TIFF file")
    order = "<" if tiff.startswith(b"II") else ">"
    for tag, kind, data in _entries(tiff, order):
        if tag == _TAG:
            return _whole_number(data, order, _TYPES[kind][1])
    return None


def _entries(tiff: bytes, order: str) -> Iterator[tuple[int, int, bytes]]:
    """Yield tag, type and data of each entry of the first directory, up to the first truncated entry."""
    (at,) = struct.unpack_from(order + "L", tiff, 4)
    if at + 2 > len(tiff):
        return
    (count,) = struct.unpack_from(order + "H", tiff, at)
    at, outside, seen = at + 2, 0, set[int]()
    for begin in range(at, min(at + count * _ENTRY_BYTES, len(tiff) - _ENTRY_BYTES + 1), _ENTRY_BYTES):
        tag, kind, values, offset = struct.unpack_from(order + "HHLL", tiff, begin)
        size = values * _TYPES.get(kind, (0, ""))[0]
        if tag in seen:
            continue
        begin_data = begin + 8
        if size > _INLINE_BYTES:
            outside += size
            if outside > len(tiff):
                continue
            begin_data = offset
        data = tiff[begin_data : begin_data + size]
        if len(data) < size:
            return
        if data:
            seen.add(tag)
            yield tag, kind, data


def _whole_number(data: bytes, order: str, layout: str) -> int:
    """Return the first value if it is an integer from 1 to 8, else 0."""
    if not layout:
        return 0
    number, *denominator = struct.unpack_from(order + layout, data)
    if denominator:
        number = number / denominator[0] if denominator[0] else 0
    return int(number) if number in range(1, 9) else 0
