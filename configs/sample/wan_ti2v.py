"""Sampling parameters of Wan 2.2 TI2V, following Diffusers 0.42's pipelines with `expand_timesteps`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from common.checkpoint import Checkpoint
from configs.sample.base import ImageRoles
from configs.sample.wan import WanSamplingParams


@dataclass(frozen=True, kw_only=True)
class WanTI2VSamplingParams(WanSamplingParams):
    """Wan 2.2 TI2V, text to video. Sizes are multiples of 32: 16 pixels per latent, 2 latents per patch.

    Defaults are those of Diffusers' call, as for Wan 2.1. The published 5B model was trained for 704 x 1280 and 121
    frames, which a checkpoint's sampling_defaults.json can set. Diffusers' call has no frame rate; the model was
    trained for 24 frames per second.
    """

    supported_version: ClassVar[str] = "Wan 2.2 TI2V"
    other_versions: ClassVar[Mapping[str, str]] = {"boundary_ratio": "two transformers"}

    frame_rate: float = 24.0


@dataclass(frozen=True, kw_only=True)
class WanTI2VImageSamplingParams(WanTI2VSamplingParams):
    """Wan 2.2 TI2V, image to video. The image, stretched to height x width, is the first frame."""

    @classmethod
    def image_roles(cls, checkpoint: Checkpoint) -> ImageRoles:
        """One required image. A last image, which Diffusers ignores with `expand_timesteps`, is rejected."""
        del checkpoint
        return ImageRoles(required=("image",))
