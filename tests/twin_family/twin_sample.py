"""Sampling parameters of the twin family's variant with an image: image roles, a default and a parameter."""

from __future__ import annotations

from dataclasses import dataclass

from toy_sample import ToySamplingParams

from common.checkpoint import Checkpoint
from configs.sample.base import ImageRoles, parameter


@dataclass(frozen=True, kw_only=True)
class TwinImageSamplingParams(ToySamplingParams):
    """One image is required, a second one is optional."""

    num_inference_steps: int = 6
    strength: float = parameter("How much the image counts.", 1.0, minimum=0.0, maximum=4.0)

    @classmethod
    def image_roles(cls, checkpoint: Checkpoint) -> ImageRoles:
        """The second image is optional."""
        del checkpoint
        return ImageRoles(required=("image",), optional=("image_1",))
