"""Videos whose first latent frame is that of an image: callbacks that image-to-video families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from configs.pipeline_configs.base import DenoisingConfig, ImageLatentsConfig, Parts, Shapes

if TYPE_CHECKING:
    from common.artifacts import Canvas


class FirstFrameConfig(ImageLatentsConfig, DenoisingConfig):
    """The image is the first latent frame, which is not denoised: it has the timestep 0, and is put back at the end.

    It stands before the family's configuration among the bases, some of whose callbacks it replaces.
    """

    frame_dim: ClassVar[int] = 2
    """Dimension of the denoiser's latents along which frames, or their tokens, follow on each other."""

    def condition_shapes(self, canvas: Canvas) -> Shapes:
        """One latent frame."""
        batch, channels, _, *size = self.raw_latent_shapes(canvas, 1)["video"]
        return {"condition": (batch, channels, 1, *size)}

    def image_latents(self, encode: Callable[[Tensor], Tensor], images: Mapping[str, Tensor], canvas: Canvas) -> Parts:
        """Normalised latents of the image as a video of one frame, float32 (1, C, 1, rows, columns)."""
        del canvas
        return {"condition": encode(images["image"][:, :, None])}

    def model_timestep(self, timesteps: Tensor) -> Tensor:
        """0 for the tokens of the first latent frame, the schedule's for the others: (steps, B, 2)."""
        return torch.stack((torch.zeros_like(timesteps), timesteps), dim=-1)

    def after_loop(self, latents: Parts, conditions: Parts) -> Parts:
        """The image in place of the first latent frame."""
        return self.with_first_frame(latents, conditions)

    def with_first_frame(self, latents: Parts, conditions: Parts) -> Parts:
        """The latents with the image's as the first frame of the video, both float32."""
        first, video, dim = conditions["condition"], latents["video"], self.frame_dim
        length = first.shape[dim]
        rest = video.narrow(dim, length, video.shape[dim] - length)
        return {**latents, "video": torch.cat((first, rest), dim=dim)}
