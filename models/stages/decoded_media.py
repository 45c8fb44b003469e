"""Functions shared by all decoding stages: pixels from the VAE's output, and media items of a reply."""

from __future__ import annotations

import torch
from torch import Tensor

from common.artifacts import Canvas, MediaItem
from common.errors import InternalError, InvalidInput

DEFAULT_FRAME_RATE = 16.0
"""Frames per second of a video whose request sets no frame rate."""


def pixels_of(decoded: Tensor) -> Tensor:
    """Map values in [-1, 1] to [0, 1], float32 on the CPU. Raises InternalError for non-finite values."""
    return check_finite((decoded * 0.5 + 0.5).clamp(0, 1).float().cpu().contiguous(), "pixels")


def check_finite(values: Tensor, kind: str) -> Tensor:
    """Return `values` unchanged. Raises InternalError for non-finite values."""
    if not values.isfinite().all():
        raise InternalError(f"{kind}: the model returned non-finite values; its weights or latents may have overflowed")
    return values


def media_item(data: bytes, content_type: str, canvas: Canvas, num_frames: int) -> MediaItem:
    """The media item of a file, or of a fragment that has `num_frames` frames."""
    return MediaItem(
        data=torch.frombuffer(bytearray(data), dtype=torch.uint8),
        content_type=content_type,
        height=canvas.height,
        width=canvas.width,
        num_frames=num_frames,
    )


def unsupported_format(output_format: str, supported: str) -> InvalidInput:
    """The error for a format other than `supported` and safetensors."""
    message = f"output_format: {output_format!r} is not supported by this model; {supported} and safetensors work"
    return InvalidInput(message, field="output_format")
