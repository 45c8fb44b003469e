"""The video and audio VAEs of LTX-2, which normalize latents with statistics in their weights.

Wraps Diffusers' AutoencoderKLLTX2Video and AutoencoderKLLTX2Audio.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.loader import load_pretrained
from models.vaes.normalized import NormalizedVideoVAE

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint


class LTX2VideoVAE(NormalizedVideoVAE):
    """Encoder and decoder of one video at a time, to and from normalized latents."""

    def encode(self, video: Tensor) -> Tensor:
        """Mode of the latents, float32 (1, C, latent frames, h, w), of a video (1, 3, frames, H, W)."""
        return self.normalized(self.distribution(video).mode())

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode latents (1, C, latent frames, h, w) to frames (3, H, W) in about [-1, 1].

        The decoder is not causal: the whole video is decoded before the first frame is yielded.
        """
        yield from self.frames(self.denormalized(latents))


class LTX2AudioVAE:
    """Decoder of normalized latents to spectrograms."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, C, length, latent bins) to log-mel spectrograms (B, channels, frames, bins)."""
        spectrogram: Tensor = self._vae.decode(self.denormalized(latents).to(self._vae.dtype), return_dict=False)[0]
        return spectrogram

    def denormalized(self, latents: Tensor) -> Tensor:
        """Decoder input of normalized latents, in their dtype; statistics are per channel and latent bin."""
        shape = (1, latents.shape[1], 1, latents.shape[3])
        mean, std = (each.view(shape).to(latents) for each in (self._vae.latents_mean, self._vae.latents_std))
        raw: Tensor = latents * std + mean
        return raw


def load_ltx2_video_vae(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> LTX2VideoVAE:
    """Load Diffusers' AutoencoderKLLTX2Video. Raises CheckpointError."""
    return LTX2VideoVAE(load_pretrained(checkpoint, name, device, dtype))


def load_ltx2_audio_vae(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> LTX2AudioVAE:
    """Load Diffusers' AutoencoderKLLTX2Audio. Raises CheckpointError."""
    return LTX2AudioVAE(load_pretrained(checkpoint, name, device, dtype))
