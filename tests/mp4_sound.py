"""Reads the sound of an MP4 file, for tests."""

from __future__ import annotations

import io

import av
import torch
from torch import Tensor


def decoded_sound(file: bytes) -> Tensor:
    """Samples (channels, samples) of the first audio track, float32."""
    with av.open(io.BytesIO(file), mode="r") as container:
        return torch.cat([torch.from_numpy(frame.to_ndarray()) for frame in container.decode(audio=0)], dim=1)
