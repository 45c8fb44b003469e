"""The VAE of LTX-Video, 0.9.0 and 0.9.5. Modules and weights are Diffusers'."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.loader import load_pretrained
from models.vaes.normalised import NormalisedVideoVAE
from models.vaes.whole_video import WholeVideoSession

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint


class LTXVideoVAE(NormalisedVideoVAE):
    """Encoder and decoder of one video at a time, to and from normalised latents.

    The decoder sees later frames too: all are decoded at once, before the first one is there. Latents lose precision,
    if the VAE has less, only after they are denormalised.
    """

    def sample(self, video: Tensor, noise: Tensor) -> Tensor:
        """Latents drawn with `noise`, in their shape: float32 (1, C, latent frames, h, w).

        The video is (1, 3, frames, H, W) in [-1, 1].
        """
        found = self.distribution(video)
        return self.normalised(found.mean + found.std * noise.to(found.mean))

    def session(
        self,
        num_latent_frames: int,
        height: int,
        width: int,
        *,
        concurrent: int = 1,
        noise: Tensor | None = None,
        scale: float = 0.0,
        timestep: float = 0.0,
    ) -> WholeVideoSession:
        """Start decoding a video; all frames come with the last of its latents, whatever their size.

        A decoder that is conditioned on a timestep needs `noise` (1, C, num_latent_frames, height, width), of which
        `scale` is the share.
        """
        del height, width, concurrent
        if noise is None:
            return WholeVideoSession(self.decode, num_latent_frames)
        decode = partial(self.decode_noisy, noise=noise, scale=scale, timestep=timestep)
        return WholeVideoSession(decode, num_latent_frames)

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Frames (3, H, W) in about [-1, 1], of latents (1, C, latent frames, h, w), float32."""
        return self.frames(self.denormalised(latents))

    def decode_noisy(self, latents: Tensor, noise: Tensor, scale: float, timestep: float) -> Iterator[Tensor]:
        """The same, with a share of noise in the latents, which the decoder removes; for a timestep in [0, 1]."""
        raw = self.denormalised(latents).to(self._vae.dtype)
        share = torch.tensor(scale, dtype=raw.dtype, device=raw.device)
        mixed = (1 - share) * raw + share * noise.to(raw)
        return self.frames(mixed, torch.tensor([timestep], dtype=raw.dtype, device=raw.device))


def load_ltx_video_vae(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> LTXVideoVAE:
    """Load Diffusers' AutoencoderKLLTXVideo. Raises CheckpointError."""
    return LTXVideoVAE(load_pretrained(checkpoint, name, device, dtype))
