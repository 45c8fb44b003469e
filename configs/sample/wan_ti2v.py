"""Sampling parameters of Wan 2.2 TI2V, as Diffusers 0.42's pipelines with `expand_timesteps` take and round them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from common.checkpoint import Checkpoint
from configs.sample.base import ImageRoles
from configs.sample.wan import WanSamplingParams


@dataclass(frozen=True, kw_only=True)
class WanTI2VSamplingParams(WanSamplingParams):
    """Wan 2.2 TI2V from text alone. Sizes are multiples of 32: 16 pixels make a latent, 2 latents a patch.

    Defaults are those of Diffusers' call, as for Wan 2.1. The published 5B model is made for 704 x 1280 and 121 frames:
    a checkpoint's sampling_defaults.json can say so. Diffusers' call has no frame rate; the model is made for 24.
    """

    supported_version: ClassVar[str] = "Wan 2.2 TI2V"
    other_versions: ClassVar[Mapping[str, str]] = {"boundary_ratio": "two transformers"}

    frame_rate: float = 24.0


@dataclass(frozen=True, kw_only=True)
class WanTI2VImageSamplingParams(WanTI2VSamplingParams):
    """Wan 2.2 TI2V from an image, resized to height x width without its aspect: the video's first frame."""

    @classmethod
    def image_roles(cls, checkpoint: Checkpoint) -> ImageRoles:
        """One image. Diffusers ignores a last image with `expand_timesteps`; here it is refused."""
        del checkpoint
        return ImageRoles(required=("image",))
