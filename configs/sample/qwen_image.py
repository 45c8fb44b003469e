"""Sampling parameters of Qwen-Image and Qwen-Image-Edit, as Diffusers 0.42's pipelines take and round them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self

from common.artifacts import ParamValue
from common.checkpoint import Checkpoint
from common.errors import InvalidInput
from common.image_header import ImageHeader
from configs.models.fields import ConfigFields
from configs.models.vaes.qwen_image import given_size, spatial_factor
from configs.sample.base import ImageRoles, ParamWarning, parameter
from configs.sample.packed import PackedSamplingParams

_HIGHEST_LAST_SIGMA = 0.9999


@dataclass(frozen=True, kw_only=True)
class QwenImageSamplingParams(PackedSamplingParams):
    """Qwen-Image and its fine-tunes. There is no guidance embedding: guidance_scale is taken, and has no effect."""

    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    true_cfg_scale: float = 4.0
    max_sequence_length: int = parameter("Tokens of the prompt that the denoiser gets.", 512, minimum=1, maximum=1024)

    @classmethod
    def pixels_per_latent(cls, checkpoint: Checkpoint) -> int:
        """From the number of the VAE's downsampling steps."""
        return spatial_factor(ConfigFields("vae", checkpoint.module_config("vae")))

    def fitted(self, checkpoint: Checkpoint, given: Collection[str]) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Round sizes and steps. Refuse schedules that cannot end: they are stretched to the last noise level.

        Diffusers divides 0 by 0 there, and draws a picture of no numbers.
        """
        params, warnings = super().fitted(checkpoint, given)
        if checkpoint.module_config("scheduler").get("shift_terminal"):
            if params.sigmas and params.sigmas[-1] > _HIGHEST_LAST_SIGMA:
                message = f"the last of sigmas must be below {_HIGHEST_LAST_SIGMA}, but is {params.sigmas[-1]}"
                raise InvalidInput(f"{message}; this model's schedule is stretched from 1 to it", field="sigmas")
            if params.num_inference_steps < 2 and not params.sigmas:
                message = "num_inference_steps must be at least 2, because this model's schedule has two fixed ends"
                raise InvalidInput(f"{message}, but is {params.num_inference_steps}", field="num_inference_steps")
        return params, warnings

    def without_effect(self, checkpoint: Checkpoint) -> dict[str, str]:
        """guidance_scale never has any."""
        return {
            **super().without_effect(checkpoint),
            "guidance_scale": "on this model, which has no guidance embedding",
        }


@dataclass(frozen=True, kw_only=True)
class QwenImageEditSamplingParams(QwenImageSamplingParams):
    """Qwen-Image-Edit. The result has the picture's proportion and about a square mebipixel, unless a size is set."""

    @classmethod
    def image_roles(cls, checkpoint: Checkpoint) -> ImageRoles:
        """One picture."""
        del checkpoint
        return ImageRoles(required=("image",))

    @classmethod
    def image_defaults(cls, images: Mapping[str, ImageHeader]) -> dict[str, ParamValue]:
        """The size that the picture is edited in."""
        if "image" not in images:
            return {}
        height, width = given_size(images["image"].height, images["image"].width)
        return {"height": height, "width": width}

    def without_effect(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Nor has max_sequence_length: the prompt is read whole, as Diffusers does."""
        return {
            **super().without_effect(checkpoint),
            "max_sequence_length": "on this model, which reads the whole prompt",
        }
