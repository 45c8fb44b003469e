"""Sampling parameters of the variant with an image: image roles, a default and a parameter."""

from __future__ import annotations

from dataclasses import dataclass

from toy_sample import ToySamplingParams

from common.checkpoint import Checkpoint
from configs.sample.base import ImageRoles, parameter


@dataclass(frozen=True, kw_only=True)
class TwinImageSamplingParams(ToySamplingParams):
    """Parameters of the variant with an image; a second image is optional."""

    num_inference_steps: int = 6
    strength: float = parameter("Weight of the image's color.", 1.0, minimum=0.0, maximum=4.0)

    @classmethod
    def image_roles(cls, checkpoint: Checkpoint) -> ImageRoles:
        """Return a required and an optional image role."""
        del checkpoint
        return ImageRoles(required=("image",), optional=("image_1",))
