"""Header reader, decoder and Pillow's exif_transpose() agree on size and orientation."""

from __future__ import annotations

import io
import itertools
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from common.errors import InvalidInput
from common.image_header import read_image_header
from models.images import open_image
from process_memory import measured_growth

Piece = tuple[bytes, bytes]
"""Kind and data of a PNG chunk, of a WebP chunk or of a JPEG segment. The kind of a JPEG segment is b"APP1"."""

ORDERS = ("<", ">")
"""Byte orders of struct formats."""
NUMBERS = {3: "H", 4: "L", 5: "LL", 6: "b", 8: "h", 9: "l", 10: "ll", 11: "f", 12: "d", 13: "L", 16: "Q"}
"""Struct formats of the numeric TIFF types."""
TEXTS = (1, 2, 7)
"""TIFF types BYTE, ASCII and UNDEFINED."""
XMP_START = b"http://ns.adobe.com/xap/1.0/\0"
RAW, XMP_KEY = b"Raw profile type exif", b"XML:com.adobe.xmp"


def encoded(kind: str, **options: object) -> bytes:
    image = Image.new("RGB", (6, 4))
    image.putdata([(40 * x, 60 * y, 10 * x * y) for y in range(4) for x in range(6)])
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PNG, JPEG = encoded("PNG"), encoded("JPEG")
WEBPS = (encoded("WEBP"), encoded("WEBP", lossless=True))


def tiff(order: str, kind: int, value: int, count: int = 1) -> bytes:
    """A TIFF file whose orientation entry follows an entry with a value outside the directory."""
    layout = NUMBERS.get(kind, "B")
    one = struct.pack(order + layout, value, *((1,) if len(layout) == 2 else ()))
    data = one * count
    at = 8 + 2 + 2 * 12 + 4
    other = struct.pack(order + "HHLL", 0x010F, 2, 6, at)
    inline = data.ljust(4, b"\0") if len(data) <= 4 else struct.pack(order + "L", at + 6)
    entry = struct.pack(order + "HHL", 0x0112, kind, count) + inline
    start = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "L", 8)
    return start + struct.pack(order + "H", 2) + other + entry + bytes(4) + b"maker\0" + data


def short(value: int) -> bytes:
    return tiff("<", 3, value)


def xmp(value: object, element: bool = False) -> bytes:
    where = f"><tiff:Orientation>{value}</tiff:Orientation" if element else f' tiff:Orientation="{value}"'
    return f"<x:xmpmeta><rdf:Description{where}></rdf:Description></x:xmpmeta>".encode()


def raw(exif: bytes) -> bytes:
    """EXIF as ImageMagick writes it into PNG text."""
    return b"\nexif\n%8d\n" % len(exif) + b"\n".join(exif.hex().encode()[at : at + 72] for at in range(0, 999, 72))


def text(key: bytes, value: bytes) -> Piece:
    return b"tEXt", key + b"\0" + value


def packed_text(key: bytes, value: bytes) -> Piece:
    return b"zTXt", key + b"\0\0" + zlib.compress(value)


def international(key: bytes, value: bytes, packed: bool = False) -> Piece:
    return b"iTXt", key + (b"\0\1\0\0\0" + zlib.compress(value) if packed else b"\0\0\0\0\0" + value)


def png(before: Sequence[Piece], after: Sequence[Piece] = ()) -> bytes:
    start, end = PNG.index(b"IDAT") - 4, PNG.index(b"IEND") - 4
    first, last = (
        b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in pieces)
        for pieces in (before, after)
    )
    return PNG[:start] + first + PNG[start:end] + last + PNG[end:]


def jpeg(before: Sequence[Piece], after: Sequence[Piece] = ()) -> bytes:
    """A JPEG with APP1 segments at its start and after its frame header."""
    frame = JPEG.index(b"\xff\xc0")
    frame += 2 + struct.unpack(">H", JPEG[frame + 2 : frame + 4])[0]
    first, last = (
        b"".join(b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data for _, data in pieces)
        for pieces in (before, after)
    )
    return JPEG[:2] + first + JPEG[2:frame] + last + JPEG[frame:]


def webp(pieces: Sequence[Piece], flags: int = 0x0C, image: bytes = WEBPS[0]) -> bytes:
    canvas = bytes([flags, 0, 0, 0]) + (5).to_bytes(3, "little") + (3).to_bytes(3, "little")
    chunks = [(b"VP8X", canvas), (image[12:16], image[20:]), *pieces]
    body = b"WEBP" + b"".join(k + struct.pack("<I", len(d)) + d + bytes(len(d) % 2) for k, d in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def app1(exif: bytes) -> Piece:
    return b"APP1", b"Exif\0\0" + exif


def decoded_by_pillow(data: bytes) -> Image.Image | None:
    """The image as Diffusers loads it; None where Pillow raises an error."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception:  # noqa: BLE001 - Pillow raises any type for damaged metadata.
        return None


def check(data: bytes, *, refusable: bool = False) -> None:
    """Compare header, decoder and Pillow. With `refusable`, the header reader may refuse files that Pillow reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = decoded_by_pillow(data)
        try:
            header = read_image_header("image", data)
        except InvalidInput:
            assert refusable or expected is None
            return
        try:
            image = open_image("image", data)
        except InvalidInput:
            assert expected is None
            return
    assert image.size == (header.width, header.height)
    if expected is not None:
        assert (image.size, image.tobytes()) == (expected.size, expected.tobytes())


def with_exif(exif: bytes) -> Iterator[bytes]:
    yield jpeg([app1(exif)])
    yield jpeg([], [app1(exif)])
    yield png([(b"eXIf", exif)])
    yield png([], [(b"eXIf", exif)])
    yield png([text(RAW, raw(exif))])
    yield png([packed_text(RAW, raw(b"Exif\0\0" + exif))])
    yield png([], [international(RAW, raw(exif), packed=True)])
    yield png([text(b"exif", exif)])
    for flags, image in itertools.product((0, 0x04, 0x08), WEBPS):
        yield webp([(b"EXIF", exif)], flags, image)
        yield webp([(b"EXIF", b"Exif\0\0" + exif)], flags, image)


def with_xmp(data: bytes) -> Iterator[bytes]:
    yield jpeg([(b"APP1", XMP_START + data)])
    yield jpeg([], [(b"APP1", XMP_START + data)])
    for packed in (False, True):
        yield png([international(XMP_KEY, data, packed)])
        yield png([], [international(XMP_KEY, data + b"\xff", packed)])
    yield png([text(XMP_KEY, data)])
    yield png([packed_text(XMP_KEY, data)])
    for flags, image in itertools.product((0, 0x04, 0x08), WEBPS):
        yield webp([(b"XMP ", data)], flags, image)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", [*NUMBERS, *TEXTS, 14])
def test_exif_of_any_type_at_any_position_is_read_as_by_pillow(order: str, kind: int) -> None:
    for value, count in itertools.product((0, 1, 2, 5, 6, 8, 9), (1, 3)):
        for data in with_exif(tiff(order, kind, value, count)):
            check(data)


@pytest.mark.parametrize("element", [False, True])
def test_xmp_at_any_position_is_read_as_by_pillow(element: bool) -> None:
    for value in (*range(10), 68, "", "x"):
        for data in with_xmp(xmp(value, element)):
            check(data)


@pytest.mark.parametrize(
    "data",
    [
        *(jpeg([app1(tiff(order, 4, 6))]) for order in ORDERS),
        jpeg([(b"APP1", XMP_START + xmp(6))]),
        png([international(XMP_KEY, xmp(6))]),
        png([packed_text(RAW, raw(short(6)))]),
        webp([(b"XMP ", xmp(6, element=True))]),
    ],
)
def test_orientation_6_swaps_width_and_height(data: bytes) -> None:
    header = read_image_header("image", data)
    assert (header.orientation, header.width, header.height) == (6, 4, 6)
    assert open_image("image", data).size == (4, 6)


EXIFS = (None, b"", b"junk", b"II*\0", *(short(value) for value in (0, 1, 6, 9)), tiff(">", 2, 5), tiff(">", 3, 8)[:20])
XMPS = (None, b"", xmp(8), xmp(3, element=True), xmp(9))


def test_conflicting_metadata_has_pillows_precedence() -> None:
    for exif, other, xmp_data in itertools.product(EXIFS, EXIFS, XMPS):
        segments = [app1(each) for each in (exif, other) if each is not None]
        chunks = [(b"EXIF", each) for each in (exif, other) if each is not None]
        blocks = [(b"eXIf", exif)] if exif is not None else []
        after = [text(RAW, raw(other))] if other is not None else []
        second_exif = [(b"eXIf", other)] if other is not None else []
        if xmp_data is not None:
            segments.insert(1, (b"APP1", XMP_START + xmp_data))
            chunks.append((b"XMP ", xmp_data))
            blocks.append(international(XMP_KEY, xmp_data))
        for data in (jpeg(segments), webp(chunks), png(blocks, after), png(blocks, second_exif), png(after, blocks)):
            check(data)


PNG_PIECES = [
    *((b"eXIf", exif) for exif in EXIFS if exif is not None),
    *(make(RAW, raw(short(5))) for make in (text, packed_text, international)),
    *(make(key, xmp(7)) for make in (text, packed_text, international) for key in (XMP_KEY, b"xmp", b"exif")),
    (b"1-+ ", b"no chunk name"),
    (b"zTXt", RAW + b"\0\0no zlib"),
    (b"iTXt", XMP_KEY + b"\0\1\0\0\0no zlib"),
]
APP1_PIECES = [app1(exif) for exif in EXIFS if exif] + [(b"APP1", XMP_START + xmp(value)) for value in (5, 8)]
WEBP_PIECES = [
    (kind, data) for kind in (b"EXIF", b"XMP ", b"ABCD") for data in (short(6), tiff(">", 4, 8), xmp(5), b"odd")
]


@st.composite
def mutated(draw: st.DrawFn, piece: Piece) -> Piece:
    """A copy of `piece` that may be truncated and may have changed bytes."""
    kind, data = piece
    changed = bytearray(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)
    for at, value in draw(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4)):
        if changed:
            changed[at % len(changed)] = value
    return kind, bytes(changed)


def pieces(pool: list[Piece]) -> st.SearchStrategy[list[Piece]]:
    return st.lists(st.sampled_from(pool).flatmap(lambda piece: st.one_of(st.just(piece), mutated(piece))), max_size=4)


FILES = st.one_of(
    st.builds(png, pieces(PNG_PIECES), pieces(PNG_PIECES)),
    st.builds(jpeg, pieces(APP1_PIECES), pieces(APP1_PIECES)),
    st.builds(webp, pieces(WEBP_PIECES), st.sampled_from([0, 4, 8, 12, 0x1C]), st.sampled_from(WEBPS)),
)


@settings(max_examples=600)
@given(data=FILES)
def test_any_metadata_is_read_as_by_pillow(data: bytes) -> None:
    check(data)


@settings(max_examples=200)
@given(
    data=FILES,
    cut=st.one_of(st.just(0), st.integers(0, 600)),
    changes=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255))),
)
def test_damaged_files_are_refused_or_read_as_by_pillow(data: bytes, cut: int, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(data[: max(1, len(data) - cut)])
    for at, value in changes:
        damaged[at % len(damaged)] = value
    check(bytes(damaged), refusable=True)


@pytest.mark.parametrize("mode", ["I;16", "L", "1", "LA", "RGB"])
def test_16_bit_gray_is_detected_and_converted_as_by_pillow(mode: str) -> None:
    file = io.BytesIO()
    Image.new(mode, (5, 3), 1).save(file, "PNG")
    assert read_image_header("image", file.getvalue()).is_16_bit_gray == (mode == "I;16")
    check(file.getvalue())


@pytest.mark.parametrize("key", [RAW, XMP_KEY])
@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
def test_expanding_metadata_is_refused_by_the_header_reader(kind: bytes, key: bytes) -> None:
    flags = b"\0\0" if kind == b"zTXt" else b"\0\1\0\0\0"
    bomb, chunk = zlib.compress(bytes(64 << 20)), zlib.compress(bytes((1 << 20) - 1))
    for data in (png([(kind, key + flags + bomb)]), png([], [(kind, key + flags + chunk)] * 9)):
        with measured_growth() as growth, pytest.raises(InvalidInput, match="metadata that expands") as caught:
            read_image_header("image", data)
        assert caught.value.field == "image"
        assert growth.peak_bytes < 32 << 20


def test_exif_segments_are_bounded() -> None:
    read_image_header("image", jpeg([app1(short(6))] * 256))
    with pytest.raises(InvalidInput, match="more than 256 EXIF segments"):
        read_image_header("image", jpeg([app1(short(6))] * 257))
