"""What the video VAEs of LTX-Video and LTX-2 share: latents are normalised with statistics among the weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor


class NormalisedVideoVAE:
    """A VAE of Diffusers, of one video at a time."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def distribution(self, video: Tensor) -> Any:
        """That of the latents of a video (1, 3, frames, H, W) in [-1, 1]."""
        parameter = next(self._vae.parameters())
        return self._vae.encode(video.to(parameter.device, parameter.dtype)).latent_dist

    def frames(self, latents: Tensor, timestep: Tensor | None = None) -> Iterator[Tensor]:
        """Frames (3, H, W) in about [-1, 1], of latents (1, C, latent frames, h, w) that are not normalised.

        `timestep` (1,) in [0, 1] is that of a decoder which is conditioned on one.
        """
        (video,) = self._vae.decode(latents.to(self._vae.dtype), timestep, return_dict=False)[0]
        yield from video.unbind(1)

    def normalised(self, latents: Tensor) -> Tensor:
        """Encoded latents (1, C, latent frames, h, w) as the denoiser takes them, float32."""
        encoded = latents.float()
        mean, std = self._statistics(encoded)
        # Without the scaling factor, as Diffusers' pipelines leave it out here.
        made: Tensor = (encoded - mean) / std
        return made

    def denormalised(self, latents: Tensor) -> Tensor:
        """Latents (B, C, latent frames, h, w) as the decoder takes them, in their dtype."""
        mean, std = self._statistics(latents)
        raw: Tensor = latents * std / self._vae.config.scaling_factor + mean
        return raw

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, (1, C, 1, 1, 1)."""
        mean, std = (each.view(1, -1, 1, 1, 1).to(like) for each in (self._vae.latents_mean, self._vae.latents_std))
        return mean, std
