"""Callbacks of image-to-video families whose first latent frame is the input image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from configs.pipeline_configs.base import DenoisingConfig, ImageLatentsConfig, Parts, Shapes

if TYPE_CHECKING:
    from common.artifacts import Canvas


class FirstFrameConfig(ImageLatentsConfig, DenoisingConfig):
    """The input image is the first latent frame: it has timestep 0 and is restored after the loop.

    This class must precede the family's config in the list of bases, because its callbacks override the family's.
    """

    frame_dim: ClassVar[int] = 2
    """Dimension of frames, or of their tokens, in the denoiser's latents."""

    def condition_shapes(self, canvas: Canvas) -> Shapes:
        """Shape of one latent frame."""
        batch, channels, _, *size = self.raw_latent_shapes(canvas, 1)["video"]
        return {"condition": (batch, channels, 1, *size)}

    def image_latents(self, encode: Callable[[Tensor], Tensor], images: Mapping[str, Tensor], canvas: Canvas) -> Parts:
        """Normalized latents of the image as a video of one frame, float32 (1, C, 1, rows, columns)."""
        del canvas
        return {"condition": encode(images["image"][:, :, None])}

    def model_timestep(self, timesteps: Tensor) -> Tensor:
        """Timestep 0 for the first latent frame, the schedule's timestep for all other frames; (steps, B, 2)."""
        return torch.stack((torch.zeros_like(timesteps), timesteps), dim=-1)

    def after_loop(self, latents: Parts, conditions: Parts) -> Parts:
        """Restore the image as the first latent frame."""
        return self.with_first_frame(latents, conditions)

    def with_first_frame(self, latents: Parts, conditions: Parts) -> Parts:
        """Replace the video's first latent frame with the image's latents, both float32."""
        first, video, dim = conditions["condition"], latents["video"], self.frame_dim
        length = first.shape[dim]
        rest = video.narrow(dim, length, video.shape[dim] - length)
        return {**latents, "video": torch.cat((first, rest), dim=dim)}
