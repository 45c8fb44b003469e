"""The VAE of HunyuanVideo. Modules and weights are Diffusers'."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.loader import load_pretrained

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint


class HunyuanVideoVAE:
    """Decoder of one video at a time."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def session(self, num_latent_frames: int, height: int, width: int, *, concurrent: int = 1) -> WholeVideoSession:
        """Start decoding a video; all frames come with the last of its latents, whatever their size."""
        del height, width, concurrent
        return WholeVideoSession(self, num_latent_frames)

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Frames (3, H, W) in about [-1, 1], of latents (1, C, latent frames, h, w) without their scale.

        Long videos are decoded in overlapping spans of frames, which are blended: all are decoded before the first one
        is there.
        """
        (video,) = self._vae.decode(latents, return_dict=False)[0]
        yield from video.unbind(1)


class WholeVideoSession:
    """Decodes one video whose latents arrive in parts, once all are there."""

    def __init__(self, vae: HunyuanVideoVAE, num_latent_frames: int) -> None:
        self._vae = vae
        self._missing = num_latent_frames
        self._parts: list[Tensor] = []

    def feed(self, latents: Tensor) -> Iterator[Tensor]:
        """No frames, and with the last latents (1, C, frames, h, w) all of them. Raises ValueError beyond these."""
        self._parts.append(latents)
        self._missing -= latents.shape[2]
        if self._missing < 0:
            raise ValueError(f"latents: {latents.shape[2]} frames are {-self._missing} more than are missing")
        if not self._missing:
            yield from self._vae.decode(torch.cat(self._parts, dim=2))
            self._parts = []


def load_hunyuan_video_vae(
    checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype
) -> HunyuanVideoVAE:
    """Load Diffusers' AutoencoderKLHunyuanVideo. Raises CheckpointError."""
    return HunyuanVideoVAE(load_pretrained(checkpoint, name, device, dtype))
