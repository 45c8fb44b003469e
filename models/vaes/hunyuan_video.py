"""The VAE of HunyuanVideo. Wraps Diffusers' AutoencoderKLHunyuanVideo."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from models.loader import load_pretrained
from models.vaes.whole_video import WholeVideoSession

if TYPE_CHECKING:
    import torch

    from common.checkpoint import Checkpoint


class HunyuanVideoVAE:
    """Decoder of one video at a time."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def session(self, num_latent_frames: int, height: int, width: int, *, concurrent: int = 1) -> WholeVideoSession:
        """Start decoding a video; the session yields all frames after the last latents."""
        del height, width, concurrent
        return WholeVideoSession(self.decode, num_latent_frames)

    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """Decode unscaled latents (1, C, latent frames, h, w) to frames (3, H, W) in about [-1, 1].

        Diffusers decodes long videos in overlapping tiles of frames and blends them; the whole video is decoded before
        the first frame is yielded.
        """
        (video,) = self._vae.decode(latents, return_dict=False)[0]
        yield from video.unbind(1)


def load_hunyuan_video_vae(
    checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype
) -> HunyuanVideoVAE:
    """Load Diffusers' AutoencoderKLHunyuanVideo. Raises CheckpointError."""
    return HunyuanVideoVAE(load_pretrained(checkpoint, name, device, dtype))
