"""The VAE of Qwen-Image: a video VAE that encodes an image as a video of one frame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from models.loader import load_pretrained

if TYPE_CHECKING:
    import torch

    from common.checkpoint import Checkpoint


class QwenImageVAE:
    """Wraps Diffusers' AutoencoderKLQwenImage: encode() returns the mode instead of a distribution."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def encode(self, images: Tensor) -> Tensor:
        """Mode of the latents (B, z, 1, h, w) of images (B, 3, 1, H, W) in [-1, 1]."""
        latents: Tensor = self._vae.encode(images.to(self._vae.device, self._vae.dtype)).latent_dist.mode()
        return latents

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Decode latents (B, z, 1, h, w) to a tuple of images (B, 3, 1, H, W) in [-1, 1]."""
        assert not return_dict
        (images,) = self._vae.decode(latents, return_dict=False)
        return (images,)


def load_qwen_image_vae(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> QwenImageVAE:
    """Load Diffusers' AutoencoderKLQwenImage. Raises CheckpointError."""
    return QwenImageVAE(load_pretrained(checkpoint, name, device, dtype))
