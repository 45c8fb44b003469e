"""Decodes the audio track of an MP4 file."""

from __future__ import annotations

import io

import av
import torch
from torch import Tensor


def decoded_sound(file: bytes) -> Tensor:
    """Decode the first audio track; returns float32 samples of shape (channels, samples)."""
    with av.open(io.BytesIO(file), mode="r") as container:
        return torch.cat([torch.from_numpy(frame.to_ndarray()) for frame in container.decode(audio=0)], dim=1)
