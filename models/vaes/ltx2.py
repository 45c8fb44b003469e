"""The VAEs of LTX-2, for video and for audio. Both normalise latents with statistics among their weights.

Modules and weights are Diffusers'.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.loader import load_pretrained
from models.vaes.normalised import NormalisedVideoVAE

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint


class LTX2VideoVAE(NormalisedVideoVAE):
    """Encoder and decoder of one video at a time, to and from normalised latents."""

    def encode(self, video: Tensor) -> Tensor:
        """The likeliest latents, float32 (1, C, latent frames, h, w), of a video (1, 3, frames, H, W) in [-1, 1]."""
        return self.normalised(self.distribution(video).mode())

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Frames (3, H, W) in about [-1, 1], of latents (1, C, latent frames, h, w).

        The decoder sees later frames too: all are decoded at once, before the first one is there.
        """
        yield from self.frames(self.denormalised(latents))


class LTX2AudioVAE:
    """Decoder of normalised latents to spectrograms."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def decode(self, latents: Tensor) -> Tensor:
        """Log-mel spectrograms (B, channels, frames, bins), of latents (B, C, length, latent bins)."""
        spectrogram: Tensor = self._vae.decode(self.denormalised(latents).to(self._vae.dtype), return_dict=False)[0]
        return spectrogram

    def denormalised(self, latents: Tensor) -> Tensor:
        """Latents as the decoder takes them, in their dtype; each channel of each mel bin has statistics."""
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
