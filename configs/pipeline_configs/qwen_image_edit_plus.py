"""Qwen-Image-Edit-Plus: several input images of different sizes, numbered in the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from configs.models.encodings import ImageTextEncoding, Template
from configs.pipeline_configs.qwen_image_edit import EDIT_TEMPLATE, QwenImageEditPipelineConfig

_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def plus_template(images: int) -> Template:
    """The template of QwenImageEditPipeline with a numbered entry for each image."""
    before, image, _ = EDIT_TEMPLATE.before.partition(_IMAGE)
    assert image, "the template contains an image"
    return replace(EDIT_TEMPLATE, before=before + "".join(f"Picture {index + 1}: {_IMAGE}" for index in range(images)))


@dataclass(frozen=True, kw_only=True)
class QwenImageEditPlusPipelineConfig(QwenImageEditPipelineConfig):
    """QwenImageEditPlusPipeline's callbacks. In 2511 (zero_cond_t), input images have timestep 0."""

    title: ClassVar[str] = "Qwen-Image-Edit-Plus (2509, 2511)"
    deviations: ClassVar[str] = (
        "At most 16 images, to bound memory; Diffusers has no limit. A single step is rejected, as it is NaN in "
        "Diffusers."
    )

    transformer_flags: ClassVar[Mapping[str, bool]] = {"use_additional_t_cond": False, "use_layer3d_rope": False}
    encoder_image_area: ClassVar[int] = 384 * 384

    @property
    def image_text_encoding(self) -> ImageTextEncoding:
        """QwenImageEditPipeline's encoding, with numbered images."""
        return replace(super().image_text_encoding, template=plus_template)
