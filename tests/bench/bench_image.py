"""An image for models that start from one."""

from __future__ import annotations

import io

import torch
from PIL import Image


def smooth_image(height: int, width: int) -> Image.Image:
    """An RGB image whose colours change evenly from corner to corner."""
    rows, columns = (torch.linspace(0, 255, size) for size in (height, width))
    down, across = torch.meshgrid(rows, columns, indexing="ij")
    return Image.fromarray(torch.stack((down, across, 255 - down), dim=-1).to(torch.uint8).numpy())


def png(image: Image.Image) -> bytes:
    """The image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
