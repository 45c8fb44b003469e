"""Validation of a request's images: total pixel count and EXIF orientation."""

from __future__ import annotations

import io
import struct
import zlib
from types import SimpleNamespace
from typing import Any, cast

import pytest
from PIL import Image

from common.errors import InvalidInput
from common.image_header import MAX_PIXELS, read_image_header
from configs.sample.base import ImageRoles
from models.catalog import ServedModel
from models.images import open_image
from models.validation import InputValidationStage


def png(width: int, height: int) -> bytes:
    """PNG bytes with this size in the header and without pixel data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IEND", b"")


class Params:
    """Sampling parameters of a model with three image roles. `build()` runs after the checks of images."""

    @staticmethod
    def image_roles(_: object) -> ImageRoles:
        return ImageRoles(required=("image",), optional=("image_1", "image_2"))

    @staticmethod
    def build(*_: object) -> Any:
        raise LookupError("the images were accepted")


def validation() -> InputValidationStage:
    checkpoint = SimpleNamespace(pipeline_name="Pipeline")
    variant = SimpleNamespace(
        sampling_params=Params, roles=Params.image_roles(checkpoint), pipeline=SimpleNamespace(given={})
    )
    model = SimpleNamespace(name="m", variants=(variant,), unserved={}, checkpoint=checkpoint)
    return InputValidationStage(cast(ServedModel, model))


def test_total_pixels_of_a_request_are_bounded() -> None:
    side = int(MAX_PIXELS**0.5)
    largest = png(side, side)
    with pytest.raises(LookupError):
        validation().run({}, {"image": largest, "image_1": largest})
    with pytest.raises(InvalidInput, match=r"at most 134217728 pixels in total") as caught:
        validation().run({}, {"image": largest, "image_1": largest, "image_2": png(1, 1)})
    assert caught.value.field == "images"


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_an_image_is_rotated_by_its_exif_orientation(image_format: str) -> None:
    """With orientation 6, the left column of the stored pixels is the top row of the image."""
    stored = Image.new("RGB", (32, 16), "blue")
    stored.paste("red", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    stored.save(file, image_format, exif=exif.tobytes(), **({} if image_format == "JPEG" else {"lossless": True}))
    header = read_image_header("image", file.getvalue())
    opened = open_image("image", file.getvalue())
    assert (header.width, header.height) == opened.size == (16, 32)
    red, _, blue = cast(tuple[int, int, int], opened.getpixel((8, 4)))
    assert red > 200 > 100 > blue
