"""The header reader agrees with Pillow on pictures that it takes, and names what it does not take."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from common.errors import InvalidInput
from common.image_header import MAX_FILE_BYTES, read_image_header

_ORIENTATION = 0x0112


def picture(kind: str, mode: str = "RGB", size: tuple[int, int] = (30, 20), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 1).save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    made = Image.Exif()
    made[_ORIENTATION] = orientation
    return made


@pytest.mark.parametrize(
    "data",
    [
        *(picture("PNG", mode) for mode in ("RGB", "RGBA", "L", "P", "1", "I;16")),
        *(picture("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
        picture("JPEG", progressive=True),
        picture("WEBP"),
        picture("WEBP", lossless=True),
        picture("WEBP", "RGBA", size=(40, 17)),
        *(picture(kind, exif=exif(turn)) for kind in ("PNG", "JPEG", "WEBP") for turn in range(1, 9)),
    ],
)
def test_format_and_size_are_pillows(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as opened:
        shown = ImageOps.exif_transpose(opened)
        expected = ({"WEBP": "WebP"}.get(opened.format or "", opened.format), shown.height, shown.width)
    header = read_image_header("image", data)
    assert (header.format, header.height, header.width) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "image is empty"),
        (b"hello", "is not a PNG, JPEG or WebP image$"),
        (picture("GIF"), "but GIF"),
        (picture("BMP"), "but BMP"),
        (picture("TIFF"), "but TIFF"),
        (b"\0\0\0\x1cftypavif" + bytes(20), "but HEIF, AVIF or a video"),
        (picture("PNG", save_all=True, append_images=[Image.new("RGB", (30, 20), "green")]), "is an animated PNG"),
        (picture("WEBP", save_all=True, append_images=[Image.new("RGB", (30, 20), "green")]), "is an animated WebP"),
        (picture("PNG", "1", size=(8200, 8200)), r"at most 67108864 pixels, but is 8200 x 8200"),
        (picture("PNG", "1", size=(6500, 100)), "an aspect ratio of at most 64, but is 6500 x 100"),
        (b"\x89PNG\r\n\x1a\n" + bytes(MAX_FILE_BYTES), "at most 20 MiB"),
    ],
)
def test_what_is_not_taken_is_named(data: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        read_image_header("image", data)
    assert caught.value.field == "image"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_that_is_cut_off_is_refused_wherever_it_ends(kind: str) -> None:
    data = picture(kind, exif=exif(6))
    for length in range(1, len(data)):
        with pytest.raises(InvalidInput, match="image is"):
            read_image_header("image", data[:length])


@settings(max_examples=300, deadline=None)
@given(
    start=st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\xff\0\0\0WEBP", b""]),
    rest=st.binary(max_size=200),
)
def test_any_bytes_are_a_picture_or_invalid_input(start: bytes, rest: bytes) -> None:
    try:
        header = read_image_header("image", start + rest)
    except InvalidInput:
        return
    assert header.height > 0
    assert header.width > 0
