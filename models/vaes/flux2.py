"""The VAE of FLUX.2, which normalizes 2x2 patches of latents with statistics in its weights.

Wraps Diffusers' AutoencoderKLFlux2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from models.loader import load_pretrained

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint


class Flux2VAE:
    """Encoder and decoder of normalized 2x2 patches, whose channels are ordered (c, dy, dx)."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, H, W) to normalized patches (B, 4C, h, w) of the mode, in the VAE's dtype."""
        latents: Tensor = self._vae.encode(pixels.to(self._vae.device, self._vae.dtype)).latent_dist.mode()
        # pixel_unshuffle orders the channels as the patches do, (c, dy, dx).
        patches = torch.nn.functional.pixel_unshuffle(latents, 2)
        mean, std = self._statistics(patches)
        return (patches - mean) / std

    def decode(self, patches: Tensor, *, return_dict: bool = False) -> tuple[Tensor]:
        """Decode normalized patches (B, 4C, h, w) to a tuple of pixels (B, 3, H, W) in about [-1, 1]."""
        del return_dict
        latents = self.denormalized(patches).to(self._vae.dtype)
        pixels: Tensor = self._vae.decode(latents, return_dict=False)[0]
        return (pixels,)

    def denormalized(self, patches: Tensor) -> Tensor:
        """Decoder input (B, C, 2h, 2w) of normalized patches (B, 4C, h, w), in their dtype."""
        mean, std = self._statistics(patches)
        return torch.nn.functional.pixel_shuffle(patches * std + mean, 2)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of a patch's channels, (1, 4C, 1, 1), with dtype and device of `like`."""
        normalization = self._vae.bn
        std = torch.sqrt(normalization.running_var.view(1, -1, 1, 1) + self._vae.config.batch_norm_eps)
        return normalization.running_mean.view(1, -1, 1, 1).to(like), std.to(like)


def load_flux2_vae(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> Flux2VAE:
    """Load Diffusers' AutoencoderKLFlux2. Raises CheckpointError."""
    return Flux2VAE(load_pretrained(checkpoint, name, device, dtype))
