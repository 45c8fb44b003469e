"""Base class of the video VAEs of LTX-Video and LTX-2, whose weights contain latent statistics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


class NormalizedVideoVAE:
    """Wraps a Diffusers video VAE, for one video at a time."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def distribution(self, video: Tensor) -> Any:
        """Posterior distribution of the latents of a video (1, 3, frames, H, W) in [-1, 1]."""
        parameter = next(self._vae.parameters())
        return self._vae.encode(video.to(parameter.device, parameter.dtype)).latent_dist

    def frames(self, latents: Tensor, timestep: Tensor | None = None) -> Iterator[Tensor]:
        """Decode denormalized latents (1, C, latent frames, h, w) to frames (3, H, W) in about [-1, 1].

        `timestep` (1,) in [0, 1] is for timestep-conditioned decoders.
        """
        (video,) = self._vae.decode(latents.to(self._vae.dtype), timestep, return_dict=False)[0]
        yield from video.unbind(1)

    def normalized(self, latents: Tensor) -> Tensor:
        """Normalize encoded latents (1, C, latent frames, h, w) for the denoiser; float32."""
        encoded = latents.float()
        mean, std = self._statistics(encoded)
        # Diffusers' pipelines do not apply the scaling factor here.
        normalized: Tensor = (encoded - mean) / std
        return normalized

    def denormalized(self, latents: Tensor) -> Tensor:
        """Decoder input of normalized latents (B, C, latent frames, h, w), in their dtype."""
        mean, std = self._statistics(latents)
        raw: Tensor = latents * std / self._vae.config.scaling_factor + mean
        return raw

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, (1, C, 1, 1, 1)."""
        mean, std = (each.view(1, -1, 1, 1, 1).to(like) for each in (self._vae.latents_mean, self._vae.latents_std))
        return mean, std
