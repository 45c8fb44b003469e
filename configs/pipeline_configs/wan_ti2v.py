"""Wan 2.2 TI2V: one checkpoint that makes videos from text alone, or from text and the first frame."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from torch import Tensor

from common.errors import CheckpointError
from configs.pipeline_configs.base import Parts
from configs.pipeline_configs.first_frame import FirstFrameConfig
from configs.pipeline_configs.wan import WanPipelineConfig

if TYPE_CHECKING:
    from common.artifacts import Canvas
    from common.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class WanTI2VPipelineConfig(WanPipelineConfig):
    """Callbacks of WanPipeline with `expand_timesteps`, from text alone.

    Diffusers passes an equal timestep for each token; the denoiser computes the same result from a single timestep.
    """

    title: ClassVar[str] = "Wan 2.2 TI2V-5B"
    deviations: ClassVar[str] = "`last_image` is refused, as Diffusers ignores it."

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Read transformer and VAE. Raises CheckpointError for a transformer that is not TI2V's."""
        config = super().from_checkpoint(checkpoint)
        transformer = config.transformer
        if transformer.image_dim is not None:
            raise CheckpointError(
                f"transformer/config.json: image_dim: {transformer.image_dim} is not null; Wan 2.2 TI2V reads an image "
                "as latents only"
            )
        if transformer.patch_size != (1, 2, 2):
            raise CheckpointError(
                f"transformer/config.json: patch_size: {list(transformer.patch_size)} is not [1, 2, 2]; Diffusers "
                "gives timesteps to patches of this size only"
            )
        return config


@dataclass(frozen=True, kw_only=True)
class WanTI2VImagePipelineConfig(FirstFrameConfig, WanTI2VPipelineConfig):
    """Callbacks of WanImageToVideoPipeline with `expand_timesteps`: the image is the first latent frame.

    The denoiser sees it in place of the loop's own first frame, which goes on being denoised and is replaced at the
    end: step checkpoints hold the loop's own. Diffusers computes (1 - mask) * condition + mask * latents with a float32
    mask of zeros and ones: the same values.
    """

    def image_latents(self, encode: Callable[[Tensor], Tensor], images: Mapping[str, Tensor], canvas: Canvas) -> Parts:
        """Normalised latents of the image as a video of one frame, float32 (1, z, 1, rows, columns)."""
        del canvas
        latents = encode(images["image"][:, :, None]).float()
        mean, inverse = self._normalisation(latents.device, latents.dtype)
        return {"condition": (latents - mean) * inverse}

    def model_input(self, latents: Parts, conditions: Parts) -> Parts:
        """The image in place of the first latent frame."""
        return self.with_first_frame(latents, conditions)
