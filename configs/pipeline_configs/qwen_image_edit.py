"""Qwen-Image-Edit: the text encoder and the VAE encode the input image."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from configs.models.encodings import ImageTextEncoding, Template
from configs.models.vaes.qwen_image import IMAGE_AREA, image_size_of_area
from configs.pipeline_configs.base import ImageLatentsConfig, ImageTextConfig, Parts, Shapes
from configs.pipeline_configs.packed import CONDITION, condition_name
from configs.pipeline_configs.qwen_image import QwenImageFamilyConfig

if TYPE_CHECKING:
    from common.artifacts import Canvas

MAX_POSITIONS = 4096
"""Number of positions of Diffusers' RoPE table."""

EDIT_TEMPLATE = Template(
    before="<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>",
    after="<|im_end|>\n<|im_start|>assistant\n",
    skipped=64,
)


@dataclass(frozen=True, kw_only=True)
class QwenImageEditPipelineConfig(QwenImageFamilyConfig, ImageTextConfig, ImageLatentsConfig):
    """QwenImageEditPipeline's callbacks; image latents follow the noise tokens."""

    title: ClassVar[str] = "Qwen-Image-Edit"
    deviations: ClassVar[str] = "A single step is rejected, as it is NaN in Diffusers."

    module_loaders: ClassVar[Mapping[str, str]] = {
        **QwenImageFamilyConfig.module_loaders,
        "Qwen2_5_VLForConditionalGeneration": "models.encoder_runners.qwen_vl:load_qwen_vl_model",
    }
    vae_image_area: ClassVar[int] = IMAGE_AREA
    """Area of an input image for the VAE, in pixels."""
    encoder_image_area: ClassVar[int] = IMAGE_AREA
    """Area of an input image for the language model, in pixels."""

    @property
    def image_text_encoding(self) -> ImageTextEncoding:
        """The language model's last hidden states of template, image and prompt, without the first 64 tokens."""
        return ImageTextEncoding(
            keyword="encoder_hidden_states",
            tokenizer="tokenizer",
            encoder="text_encoder",
            processor="processor",
            template=lambda _: EDIT_TEMPLATE,
            image_token="<|image_pad|>",
            image_size=lambda height, width: image_size_of_area(height, width, self.encoder_image_area),
            max_tokens=self._text_positions_with,
        )

    def image_size(self, size: tuple[int, int], canvas: Canvas) -> tuple[int, int]:
        """The image's own size, independent of the generated image's size."""
        del canvas
        return image_size_of_area(*size, self.vae_image_area)

    def condition_shapes(self, canvas: Canvas) -> Shapes:
        """An input image with the aspect ratio of the generated image."""
        side = self.pixels_per_latent
        height, width = image_size_of_area(canvas.height, canvas.width, self.vae_image_area)
        return {CONDITION: (1, 1, self.vae.z_dim, height // side, width // side)}

    def image_latents(self, encode: Callable[[Tensor], Tensor], images: Mapping[str, Tensor], canvas: Canvas) -> Parts:
        """Normalized latents of each image, with frames before channels as in the noise: (1, 1, C, 2h, 2w)."""
        del canvas
        latents = [encode(image[:, :, None]) for image in images.values()]
        return {condition_name(index): self._normalized(each) for index, each in enumerate(latents)}

    def _text_positions_with(self, height: int, width: int) -> int:
        """Number of positions of the RoPE table that an image of this size (pixels) leaves for text."""
        side = max(image_size_of_area(height, width, self.vae_image_area)) // (2 * self.pixels_per_latent)
        return MAX_POSITIONS - side // 2
