"""Sampling parameters of Wan 2.2 A14B, following Diffusers 0.42's pipelines with `boundary_ratio`."""

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
    """Wan 2.2 T2V A14B. guidance_scale above 1 enables classifier-free guidance for all steps.

    The parameter guidance_scale_2 overrides the scale at low noise levels. Defaults are those of Diffusers' call, as
    for Wan 2.1.
    """

    supported_version: ClassVar[str] = "Wan 2.2 A14B"
    other_versions: ClassVar[Mapping[str, str]] = {"expand_timesteps": "a timestep for each token"}

    guidance_scale_2: float | None = parameter(
        "guidance_scale of steps with low noise levels.",
        None,
        minimum=0.0,
        maximum=_MAX_SCALE,
        unset="guidance_scale is used",
    )


@dataclass(frozen=True, kw_only=True)
class WanA14BImageSamplingParams(WanA14BSamplingParams):
    """Wan 2.2 I2V A14B. The images, stretched to height x width, are the first and the optional last frame."""

    @classmethod
    def build(
        cls,
        given: Mapping[str, ParamValue],
        checkpoint: Checkpoint,
        images: Mapping[str, ImageHeader] = MappingProxyType({}),
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Build as for text to video, and check that a first and a last frame are different frames."""
        params, warnings = super().build(given, checkpoint, images)
        if params.num_frames == 1 and "last_image" in images:
            raise InvalidInput("num_frames: 1 is not at least 5, the minimum with a last_image", field="num_frames")
        return params, warnings

    @classmethod
    def image_roles(cls, checkpoint: Checkpoint) -> ImageRoles:
        """The first frame, and optionally the last frame."""
        del checkpoint
        return ImageRoles(required=("image",), optional=("last_image",))
