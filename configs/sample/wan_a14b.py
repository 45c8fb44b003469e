"""Sampling parameters of Wan 2.2 A14B, as Diffusers 0.42's pipelines with `boundary_ratio` take and round them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Self

from common.artifacts import ParamValue
from common.checkpoint import Checkpoint
from common.errors import InvalidInput
from common.image_header import ImageHeader
from configs.sample.base import ImageRoles, ParamWarning, parameter
from configs.sample.wan import WanSamplingParams

_MAX_SCALE = 1000.0


@dataclass(frozen=True, kw_only=True)
class WanA14BSamplingParams(WanSamplingParams):
    """Wan 2.2 T2V A14B. guidance_scale above 1 is classifier-free guidance in all steps, whatever guidance_scale_2 is.

    Defaults are those of Diffusers' call, as for Wan 2.1.
    """

    supported_version: ClassVar[str] = "Wan 2.2 A14B"
    other_versions: ClassVar[Mapping[str, str]] = {"expand_timesteps": "a timestep for each token"}

    guidance_scale_2: float | None = parameter(
        "guidance_scale of the steps of low noise.",
        None,
        minimum=0.0,
        maximum=_MAX_SCALE,
        unset="it is guidance_scale",
    )


@dataclass(frozen=True, kw_only=True)
class WanA14BImageSamplingParams(WanA14BSamplingParams):
    """Wan 2.2 I2V A14B. The images, resized to height x width, are the first and optionally the last frame."""

    @classmethod
    def build(
        cls,
        given: Mapping[str, ParamValue],
        checkpoint: Checkpoint,
        images: Mapping[str, ImageHeader] = MappingProxyType({}),
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """As for text alone; a first and a last frame are two."""
        params, warnings = super().build(given, checkpoint, images)
        if params.num_frames == 1 and "last_image" in images:
            raise InvalidInput("num_frames must be at least 5 with a last_image, but is 1", field="num_frames")
        return params, warnings

    @classmethod
    def image_roles(cls, checkpoint: Checkpoint) -> ImageRoles:
        """The first frame, and the last one if the request brings it."""
        del checkpoint
        return ImageRoles(required=("image",), optional=("last_image",))
