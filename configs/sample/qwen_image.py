"""Sampling parameters of Qwen-Image and its editing pipelines, following Diffusers 0.42's pipelines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.artifacts import ParamValue
from common.checkpoint import Checkpoint
from common.image_header import MAX_IMAGES, ImageHeader, image_order
from configs.models.fields import ConfigFields
from configs.models.vaes.qwen_image import image_size_of_area, spatial_factor
from configs.sample.base import ImageRoles, parameter
from configs.sample.packed import PackedSamplingParams


@dataclass(frozen=True, kw_only=True)
class QwenImageSamplingParams(PackedSamplingParams):
    """Qwen-Image and its fine-tunes. guidance_scale has no effect, as there is no guidance embedding."""

    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    true_cfg_scale: float = 4.0
    max_sequence_length: int = parameter(
        "Maximum number of prompt tokens for the denoiser.", 512, minimum=1, maximum=1024
    )

    @classmethod
    def pixels_per_latent(cls, checkpoint: Checkpoint) -> int:
        """The VAE's spatial factor, from its number of downsampling layers."""
        return spatial_factor(ConfigFields("vae", checkpoint.module_config("vae")))

    def without_effect(self, checkpoint: Checkpoint) -> dict[str, str]:
        """The base class's parameters without effect, and guidance_scale."""
        return {
            **super().without_effect(checkpoint),
            "guidance_scale": "on this model, which has no guidance embedding",
        }


@dataclass(frozen=True, kw_only=True)
class QwenImageEditSamplingParams(QwenImageSamplingParams):
    """Qwen-Image-Edit. The default size has the input image's aspect ratio and about 1024 x 1024 pixels."""

    @classmethod
    def image_roles(cls, checkpoint: Checkpoint) -> ImageRoles:
        """One required image."""
        del checkpoint
        return ImageRoles(required=("image",))

    @classmethod
    def image_defaults(
        cls, images: Mapping[str, ImageHeader], values: Mapping[str, ParamValue]
    ) -> dict[str, ParamValue]:
        """The default output size."""
        del values
        if "image" not in images:
            return {}
        height, width = image_size_of_area(images["image"].height, images["image"].width)
        return {"height": height, "width": width}

    def without_effect(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Add max_sequence_length: the encoder reads the whole prompt, as in Diffusers."""
        return {
            **super().without_effect(checkpoint),
            "max_sequence_length": "on this model, which reads the whole prompt",
        }


@dataclass(frozen=True, kw_only=True)
class QwenImageEditPlusSamplingParams(QwenImageEditSamplingParams):
    """Qwen-Image-Edit-Plus. The default size has the last input image's aspect ratio."""

    @classmethod
    def image_roles(cls, checkpoint: Checkpoint) -> ImageRoles:
        """One or more images, ordered by number; Diffusers sets no limit."""
        del checkpoint
        return ImageRoles(required=("image",), optional=tuple(f"image_{index}" for index in range(1, MAX_IMAGES)))

    @classmethod
    def image_defaults(
        cls, images: Mapping[str, ImageHeader], values: Mapping[str, ParamValue]
    ) -> dict[str, ParamValue]:
        """The default output size, from the last image."""
        if not images:
            return {}
        return super().image_defaults({"image": images[max(images, key=image_order)]}, values)
