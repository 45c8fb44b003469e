"""Images and PNG files for tests of models with image inputs."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def coarse_image(width: int, height: int, seed: int = 1) -> Image.Image:
    """A random image of few, large color patches."""
    tiles = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(tiles).resize((width, height), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    """Encode the image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
