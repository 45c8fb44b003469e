"""The VAE of Qwen-Image: that of a video model, for pictures as videos of one frame."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from models.loader import load_pretrained

if TYPE_CHECKING:
    import torch

    from common.checkpoint import Checkpoint


class QwenImageVAE:
    """Diffusers' AutoencoderKLQwenImage, in tensors."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae

    def encode(self, pictures: Tensor) -> Tensor:
        """The likeliest latents (batch, z, 1, h, w) of pictures (batch, 3, 1, H, W) in [-1, 1]."""
        latents: Tensor = self._vae.encode(pictures.to(self._vae.device, self._vae.dtype)).latent_dist.mode()
        return latents

    def decode(self, latents: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Pictures (batch, 3, 1, H, W) in [-1, 1] of latents (batch, z, 1, h, w), in a tuple."""
        assert not return_dict
        (pictures,) = self._vae.decode(latents, return_dict=False)
        return (pictures,)


def load_qwen_image_vae(checkpoint: Checkpoint, name: str, device: torch.device, dtype: torch.dtype) -> QwenImageVAE:
    """Read the weights. Raises CheckpointError."""
    return QwenImageVAE(load_pretrained(checkpoint, name, device, dtype))
