"""Steps that all decoding stages share: pixels from the VAE's output, and the media items of a reply."""

from __future__ import annotations

import torch
from torch import Tensor

from common.artifacts import Canvas, MediaItem
from common.errors import InternalError, InvalidInput

DEFAULT_FRAME_RATE = 16.0
"""Frames a second of a video whose request names no rate."""


def pixels_of(decoded: Tensor) -> Tensor:
    """Map values in [-1, 1] to [0, 1], float32 on the CPU. Raises InternalError for values that are not finite."""
    return finite((decoded * 0.5 + 0.5).clamp(0, 1).float().cpu().contiguous(), "pixels")


def finite(made: Tensor, kind: str) -> Tensor:
    """Return `made` unchanged. Raises InternalError for values that are not finite."""
    if not made.isfinite().all():
        raise InternalError(f"the model made {kind} that are no numbers: its weights or latents overflowed")
    return made


def media_item(data: bytes, content_type: str, canvas: Canvas, num_frames: int) -> MediaItem:
    """The item of a whole file."""
    return MediaItem(
        data=torch.frombuffer(bytearray(data), dtype=torch.uint8),
        content_type=content_type,
        height=canvas.height,
        width=canvas.width,
        num_frames=num_frames,
    )


def unsupported_format(output_format: str, made: str) -> InvalidInput:
    """The error for a format other than `made` and safetensors."""
    message = f"output_format {output_format!r} is not made by this model; it makes {made} and safetensors"
    return InvalidInput(message, field="output_format")
