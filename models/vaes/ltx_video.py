"""The VAE of LTX-Video, 0.9.0 and 0.9.5. Wraps Diffusers' AutoencoderKLLTXVideo."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.loader import load_pretrained
from models.vaes.normalized import NormalizedVideoVAE
from models.vaes.whole_video import WholeVideoSession

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint


class LTXVideoVAE(NormalizedVideoVAE):
    """Encoder and decoder of one video at a time, to and from normalized latents.

    The decoder is not causal: the whole video is decoded before the first frame is yielded. Latents are converted to
    the VAE's dtype only after they are denormalized.
    """

    def sample(self, video: Tensor, noise: Tensor) -> Tensor:
        """Sample normalized latents with `noise`, both (1, C, latent frames, h, w); float32.

        The video is (1, 3, frames, H, W) in [-1, 1].
        """
        posterior = self.distribution(video)
        return self.normalized(posterior.mean + posterior.std * noise.to(posterior.mean))

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
        """Start decoding a video; the session yields all frames after the last latents.

        A timestep-conditioned decoder requires `noise` (1, C, num_latent_frames, height, width); `scale` in [0, 1] is
        the fraction of noise mixed into the latents.
        """
        del height, width, concurrent
        if noise is None:
            return WholeVideoSession(self.decode, num_latent_frames)
        decode = partial(self.decode_noisy, noise=noise, scale=scale, timestep=timestep)
        return WholeVideoSession(decode, num_latent_frames)

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode float32 latents (1, C, latent frames, h, w) to frames (3, H, W) in about [-1, 1]."""
        return self.frames(self.denormalized(latents))

    def decode_noisy(self, latents: Tensor, noise: Tensor, scale: float, timestep: float) -> Iterator[Tensor]:
        """Decode with noise mixed into the latents, for a decoder conditioned on `timestep` in [0, 1]."""
        raw = self.denormalized(latents).to(self._vae.dtype)
        fraction = torch.tensor(scale, dtype=raw.dtype, device=raw.device)
        mixed = (1 - fraction) * raw + fraction * noise.to(raw)
        return self.frames(mixed, torch.tensor([timestep], dtype=raw.dtype, device=raw.device))


def load_ltx_video_vae(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> LTXVideoVAE:
    """Load Diffusers' AutoencoderKLLTXVideo. Raises CheckpointError."""
    return LTXVideoVAE(load_pretrained(checkpoint, name, device, dtype))
