"""Input images for benchmarks."""

from __future__ import annotations

import io
from typing import Literal

import torch
from PIL import Image


def smooth_image(height: int, width: int) -> Image.Image:
    """An RGB image with a smooth gradient from corner to corner."""
    rows, columns = (torch.linspace(0, 255, size) for size in (height, width))
    down, across = torch.meshgrid(rows, columns, indexing="ij")
    return Image.fromarray(torch.stack((down, across, 255 - down), dim=-1).to(torch.uint8).numpy())


def random_image(side: int, mode: Literal["RGB", "RGBA"], seed: int) -> Image.Image:
    """A square noise image."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (side, side, len(mode)), dtype=torch.uint8, generator=generator)
    return Image.fromarray(pixels.numpy())


def png(image: Image.Image) -> bytes:
    """Encode the image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
