"""Sampling parameters of Qwen-Image and its editing pipelines, as Diffusers 0.42's take and round them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.artifacts import ParamValue
from common.checkpoint import Checkpoint
from common.image_header import MAX_IMAGES, ImageHeader, image_order
from configs.models.fields import ConfigFields
from configs.models.vaes.qwen_image import given_size, spatial_factor
from configs.sample.base import ImageRoles, parameter
from configs.sample.packed import PackedSamplingParams


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
    def image_defaults(
        cls, images: Mapping[str, ImageHeader], values: Mapping[str, ParamValue]
    ) -> dict[str, ParamValue]:
        """The size that the picture is edited in."""
        del values
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


@dataclass(frozen=True, kw_only=True)
class QwenImageEditPlusSamplingParams(QwenImageEditSamplingParams):
    """Qwen-Image-Edit-Plus. The result has the proportion of the last image."""

    @classmethod
    def image_roles(cls, checkpoint: Checkpoint) -> ImageRoles:
        """One image or more, in the order of their numbers; Diffusers sets no limit."""
        del checkpoint
        return ImageRoles(required=("image",), optional=tuple(f"image_{index}" for index in range(1, MAX_IMAGES)))

    @classmethod
    def image_defaults(
        cls, images: Mapping[str, ImageHeader], values: Mapping[str, ParamValue]
    ) -> dict[str, ParamValue]:
        """The size that the last image is edited in."""
        if not images:
            return {}
        return super().image_defaults({"image": images[max(images, key=image_order)]}, values)
