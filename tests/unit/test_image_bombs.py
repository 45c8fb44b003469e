"""Images with contradictory sizes or expanding data are refused within a memory bound."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import pytest
from PIL import Image, ImageFile, PngImagePlugin

from common.artifacts import ImageInputs
from common.errors import InvalidInput
from common.image_header import MAX_PIXELS, MAX_TOTAL_PIXELS, ImageHeader, check_total_size
from models.images import open_image, open_images
from process_memory import measured_growth

MOST_BYTES = 64 << 20
"""Bound of the growth of memory in bytes."""
BIG = 9_000
"""Width and height of an image above the bound of pixels."""
EXPANDED = 256 << 20
"""Size in bytes of the decompressed data of a chunk."""


def encoded(kind: str, size: tuple[int, int] = (16, 16), **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "red").save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*extra: bytes, before: bytes = b"IDAT", size: tuple[int, int] = (16, 16)) -> bytes:
    """A PNG with extra chunks before the chunk named `before`."""
    data = encoded("PNG", size)
    at = data.index(before) - 4
    return data[:at] + b"".join(extra) + data[at:]


def header_chunk(width: int, height: int) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def expanding_data() -> bytes:
    packer, zeros = zlib.compressobj(1), bytes(1 << 20)
    return b"".join(packer.compress(zeros) for _ in range(EXPANDED >> 20)) + packer.flush()


def with_second_frame_header(width: int, height: int) -> bytes:
    """A JPEG with a second SOF segment of another size."""
    data = encoded("JPEG")
    at = data.index(b"\xff\xc0")
    size = struct.unpack(">H", data[at + 2 : at + 4])[0] + 2
    other = bytearray(data[at : at + size])
    other[5:9] = struct.pack(">HH", height, width)
    return data[: at + size] + bytes(other) + data[at + size :]


def with_canvas(width: int, height: int) -> bytes:
    """A WebP whose canvas size differs from its frame size."""
    frame = encoded("WEBP", lossless=True)[12:]
    canvas = bytes(4) + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    body = b"WEBP" + b"VP8X" + struct.pack("<I", len(canvas)) + canvas + frame
    return b"RIFF" + struct.pack("<I", len(body)) + body


CONTRADICTORY_FILES: dict[str, Callable[[], bytes]] = {
    "PNG, second size larger": lambda: png(header_chunk(BIG, BIG)),
    "PNG, second size smaller": lambda: png(header_chunk(1, 1), before=b"IEND", size=(64, 64)),
    "PNG, header not first": lambda: encoded("PNG")[:8] + chunk(b"tEXt", b"a\0b") + encoded("PNG")[8:],
    "JPEG, second size larger": lambda: with_second_frame_header(BIG, BIG),
    "JPEG, second size smaller": lambda: with_second_frame_header(8, 8),
    "WebP, larger canvas": lambda: with_canvas(8_000, 8_000),
    "WebP, smaller canvas": lambda: with_canvas(8, 8),
}


@pytest.mark.parametrize("name", CONTRADICTORY_FILES)
def test_an_image_with_two_sizes_is_refused(name: str) -> None:
    message = {"PNG": "is not the first chunk", "JPE": "the header states", "Web": "cannot be decoded"}[name[:3]]
    data = CONTRADICTORY_FILES[name]()
    with measured_growth() as growth, pytest.raises(InvalidInput, match=message) as caught:
        open_image("image", data)
    assert caught.value.field == "image"
    assert growth.peak_bytes < MOST_BYTES


@pytest.mark.parametrize("bound", [None, 16, 1 << 40])
def test_the_pixel_bound_holds_for_any_global_bound_of_pillow(
    bound: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", bound)
    with pytest.raises(InvalidInput, match="image"):
        open_image("image", CONTRADICTORY_FILES["JPEG, second size larger"]())
    if bound != 16:
        assert open_image("image", encoded("PNG")).size == (16, 16)
    else:
        with pytest.raises(InvalidInput, match="cannot be decoded"):
            open_image("image", encoded("PNG"))


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_compressed_text_and_profiles_are_not_expanded(kind: bytes) -> None:
    packed = expanding_data()
    data = png(chunk(kind, b"a\0\1\0\0\0" + packed if kind == b"iTXt" else b"a\0\0" + packed))
    assert len(data) < 2 << 20
    with measured_growth() as growth, pytest.raises(InvalidInput, match="cannot be decoded"):
        open_image("image", data)
    assert growth.peak_bytes < MOST_BYTES


def test_total_expanded_text_is_bounded() -> None:
    packed = zlib.compress(bytes((1 << 20) - 1))
    data = png(*(chunk(b"zTXt", f"key{number}".encode() + b"\0\0" + packed) for number in range(500)))
    with measured_growth() as growth, pytest.raises(InvalidInput, match="cannot be decoded"):
        open_image("image", data)
    assert growth.peak_bytes < 3 * MOST_BYTES


def test_imports_do_not_relax_pillows_bounds() -> None:
    """This test module imports models.images, with which stages open images."""
    assert Image.MAX_IMAGE_PIXELS is not None
    assert Image.MAX_IMAGE_PIXELS >= MAX_PIXELS
    assert PngImagePlugin.MAX_TEXT_CHUNK <= 1 << 20
    assert PngImagePlugin.MAX_TEXT_MEMORY <= 64 << 20
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_total_pixels_of_all_images_are_bounded() -> None:
    side = 2**13
    headers = {f"image_{number}": ImageHeader("PNG", side, side) for number in range(MAX_TOTAL_PIXELS // side**2)}
    check_total_size(headers)
    with pytest.raises(InvalidInput, match="at most 134217728 pixels in total") as caught:
        check_total_size(headers | {"image": ImageHeader("PNG", 1, 1)})
    assert caught.value.field == "images"
    file = io.BytesIO()
    Image.new("1", (side, side)).save(file, "PNG")
    with measured_growth() as growth, pytest.raises(InvalidInput, match="pixels in total"):
        open_images(ImageInputs(images={f"image_{number}": file.getvalue() for number in range(3)}))
    assert growth.peak_bytes < MOST_BYTES
