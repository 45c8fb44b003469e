"""Wan 2.2 TI2V: one checkpoint for text to video and for text and first frame to video."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from torch import Tensor

from common.errors import CheckpointError
from configs.pipeline_configs.base import Parts
from configs.pipeline_configs.first_frame import FirstFrameConfig
from configs.pipeline_configs.normalization import normalized
from configs.pipeline_configs.wan import WanPipelineConfig

if TYPE_CHECKING:
    from common.artifacts import Canvas
    from common.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class WanTI2VPipelineConfig(WanPipelineConfig):
    """Callbacks of WanPipeline with `expand_timesteps` for text input.

    Diffusers passes an equal timestep for each token; the denoiser computes the same result from a single timestep.
    """

    title: ClassVar[str] = "Wan 2.2 TI2V-5B"
    deviations: ClassVar[str] = "`last_image` is rejected, as Diffusers ignores it."

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Parse the modules' config.json. Raises CheckpointError, also for a transformer other than TI2V's."""
        config = super().from_checkpoint(checkpoint)
        transformer = config.transformer
        if transformer.image_dim is not None:
            raise CheckpointError(
                f"transformer/config.json: image_dim: {transformer.image_dim} is not null; Wan 2.2 TI2V reads an image "
                "only as latents"
            )
        if transformer.patch_size != (1, 2, 2):
            raise CheckpointError(
                f"transformer/config.json: patch_size: {list(transformer.patch_size)} is not [1, 2, 2], the "
                "only patch size for which Diffusers computes timesteps per token"
            )
        return config


@dataclass(frozen=True, kw_only=True)
class WanTI2VImagePipelineConfig(FirstFrameConfig, WanTI2VPipelineConfig):
    """Callbacks of WanImageToVideoPipeline with `expand_timesteps`: the image is the first latent frame.

    The denoiser's input has the image instead of the loop's first frame. The loop still denoises its own first frame,
    which step checkpoints contain, and replaces it after the last step. Diffusers computes (1 - mask) * condition +
    mask * latents with a float32 mask of zeros and ones, which gives the same values.
    """

    def image_latents(self, encode: Callable[[Tensor], Tensor], images: Mapping[str, Tensor], canvas: Canvas) -> Parts:
        """Normalized latents of the image as a video of one frame, float32 (1, z, 1, rows, columns)."""
        del canvas
        latents = encode(images["image"][:, :, None]).float()
        return {"condition": normalized(latents, self.vae.latents_mean, self.vae.latents_std)}

    def model_input(self, latents: Parts, conditions: Parts) -> Parts:
        """Replace the first latent frame with the image."""
        return self.with_first_frame(latents, conditions)
