"""Opens the images of a request as Diffusers' load_image does.

Images are oriented by their metadata and converted to RGB or RGBA. `common.image_header` reads the orientation, as in
validation, so that both agree on the size.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from common.artifacts import ImageInputs
from common.errors import InvalidInput
from common.image_header import check_total_size, image_order, read_image_header
from common.image_orientation import SIDEWAYS

_FORMATS = ("PNG", "JPEG", "WEBP")
# Exceptions that Pillow raises for corrupt files.
_UNREADABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    AttributeError,
    struct.error,
    zlib.error,
)
# EXIF orientation to the transposition that undoes it, as in Pillow's ImageOps.exif_transpose.
_TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_images(inputs: ImageInputs, mode: Literal["RGB", "RGBA"] = "RGB") -> Mapping[str, Image.Image]:
    """Decode all images, keyed by role and sorted: image, image_1 ..., last_image. `mode` is Pillow's.

    Raises InvalidInput with the role of an image that cannot be decoded or is too large, and for images whose total
    size is too large.
    """
    files = {role: _file(inputs.images[role]) for role in sorted(inputs.images, key=image_order)}
    check_total_size({role: read_image_header(role, data) for role, data in files.items()})
    return {role: open_image(role, data, mode) for role, data in files.items()}


def open_image(role: str, data: bytes, mode: Literal["RGB", "RGBA"] = "RGB") -> Image.Image:
    """Decode an image and convert it to `mode`; conversion to RGB drops the alpha channel.

    The size in the header is checked before Pillow allocates memory, because Pillow's own limits are process-wide and
    other code may change them. Raises InvalidInput with the role.
    """
    header = read_image_header(role, data)
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            size = image.size[::-1] if header.orientation in SIDEWAYS else image.size
            if size != (header.width, header.height):
                first, second = (f"{width} x {height}" for width, height in ((header.width, header.height), size))
                raise ValueError(f"the header states {first} pixels and the image has {second}")
            transposition = _TRANSPOSITIONS.get(header.orientation)
            oriented = image if transposition is None else image.transpose(transposition)
            return oriented.convert(mode)
    except _UNREADABLE as error:
        raise InvalidInput(f"{role}: the image cannot be decoded: {error}", field=role) from None


def as_tensor(
    image: Image.Image, height: int, width: int, resampling: Image.Resampling = Image.Resampling.LANCZOS
) -> Tensor:
    """Resize to height x width, without preserving the aspect ratio, as in Diffusers.

    Returns float32 (1, channels, height, width) in [-1, 1].
    """
    resized = image.resize((width, height), resampling)
    pixels = torch.from_numpy(np.array(resized).astype(np.float32) / 255.0)
    return (2.0 * pixels - 1.0).permute(2, 0, 1)[None]


def center_crop(pixels: Tensor, height: int, width: int) -> Tensor:
    """Crop `pixels` to (1, channels, height, width), around the center; `pixels` are at least as large.

    If an odd number of rows or columns is removed, the smaller half is removed at the top or left, as in Diffusers.
    """
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def _file(data: Tensor | bytes) -> bytes:
    return data if isinstance(data, bytes) else data.numpy().tobytes()
