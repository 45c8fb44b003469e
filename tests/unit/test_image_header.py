"""The header reader agrees with Pillow and refuses unsupported files with a reason."""

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


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (30, 20), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, 1).save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> Image.Exif:
    metadata = Image.Exif()
    metadata[_ORIENTATION] = orientation
    return metadata


@pytest.mark.parametrize(
    "data",
    [
        *(encoded("PNG", mode) for mode in ("RGB", "RGBA", "L", "P", "1", "I;16")),
        *(encoded("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
        encoded("JPEG", progressive=True),
        encoded("WEBP"),
        encoded("WEBP", lossless=True),
        encoded("WEBP", "RGBA", size=(40, 17)),
        *(encoded(kind, exif=exif(value)) for kind in ("PNG", "JPEG", "WEBP") for value in range(1, 9)),
    ],
)
def test_format_and_size_equal_those_of_pillow(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as opened:
        transposed = ImageOps.exif_transpose(opened)
        expected = ({"WEBP": "WebP"}.get(opened.format or "", opened.format), transposed.height, transposed.width)
    header = read_image_header("image", data)
    assert (header.format, header.height, header.width) == expected


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "image is empty"),
        (b"hello", "is not a PNG, JPEG or WebP image$"),
        (encoded("GIF"), "but GIF"),
        (encoded("BMP"), "but BMP"),
        (encoded("TIFF"), "but TIFF"),
        (b"\0\0\0\x1cftypavif" + bytes(20), "but HEIF, AVIF or a video"),
        (encoded("PNG", save_all=True, append_images=[Image.new("RGB", (30, 20), "green")]), "is an animated PNG"),
        (encoded("WEBP", save_all=True, append_images=[Image.new("RGB", (30, 20), "green")]), "is an animated WebP"),
        (encoded("PNG", "1", size=(8200, 8200)), "8200 x 8200 is not at most 67108864 pixels"),
        (encoded("PNG", "1", size=(6500, 100)), "6500 x 100 does not have an aspect ratio of at most 64"),
        (b"\x89PNG\r\n\x1a\n" + bytes(MAX_FILE_BYTES), "at most 20 MiB"),
    ],
)
def test_unsupported_files_are_refused_with_a_reason(data: bytes, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        read_image_header("image", data)
    assert caught.value.field == "image"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_truncated_at_any_byte_is_refused(kind: str) -> None:
    data = encoded(kind, exif=exif(6))
    for length in range(1, len(data)):
        with pytest.raises(InvalidInput, match="image is"):
            read_image_header("image", data[:length])


@settings(max_examples=300)
@given(
    start=st.sampled_from([b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\xff\0\0\0WEBP", b""]),
    rest=st.binary(max_size=200),
)
def test_any_bytes_have_a_valid_header_or_raise_invalid_input(start: bytes, rest: bytes) -> None:
    try:
        header = read_image_header("image", start + rest)
    except InvalidInput:
        return
    assert header.height > 0
    assert header.width > 0
