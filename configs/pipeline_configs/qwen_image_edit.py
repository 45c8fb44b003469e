"""Qwen-Image-Edit: the picture's tokens in the text, and its latents behind those of the picture that is made."""

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

POSITIONS = 4096
"""Diffusers has so many for text; behind them it fails."""

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
    """QwenImageEditPipeline's callbacks, beside those of QwenImagePipeline."""

    title: ClassVar[str] = "Qwen-Image-Edit"
    deviations: ClassVar[str] = "A single step is refused, as it is NaN in Diffusers."

    module_loaders: ClassVar[Mapping[str, str]] = {
        **QwenImageFamilyConfig.module_loaders,
        "Qwen2_5_VLForConditionalGeneration": "models.encoder_runners.qwen_vl:load_qwen_vl_model",
    }
    given_area: ClassVar[int] = IMAGE_AREA
    """Pixels of an image as the VAE encodes it."""
    seen_area: ClassVar[int] = IMAGE_AREA
    """Pixels of an image as the language model sees it."""

    @property
    def image_text_encoding(self) -> ImageTextEncoding:
        """The language model's last states: what of the template follows its first 64 tokens, picture and prompt."""
        return ImageTextEncoding(
            keyword="encoder_hidden_states",
            tokenizer="tokenizer",
            encoder="text_encoder",
            processor="processor",
            template=lambda _: EDIT_TEMPLATE,
            picture_mark="<|image_pad|>",
            picture_size=lambda height, width: image_size_of_area(height, width, self.seen_area),
            most_tokens=self._positions_beside,
        )

    def image_size(self, size: tuple[int, int], canvas: Canvas) -> tuple[int, int]:
        """Its own, whatever the size of the picture that is made."""
        del canvas
        return image_size_of_area(*size, self.given_area)

    def condition_shapes(self, canvas: Canvas) -> Shapes:
        """That of a picture with the proportions of the one that is made."""
        side = self.pixels_per_latent
        height, width = image_size_of_area(canvas.height, canvas.width, self.given_area)
        return {CONDITION: (1, 1, self.vae.z_dim, height // side, width // side)}

    def image_latents(self, encode: Callable[[Tensor], Tensor], images: Mapping[str, Tensor], canvas: Canvas) -> Parts:
        """Normalised latents of each image, frame before channels like the noise: (1, 1, C, 2h, 2w)."""
        del canvas
        latents = [encode(image[:, :, None]) for image in images.values()]
        return {condition_name(index): self._normalised(each) for index, each in enumerate(latents)}

    def _positions_beside(self, height: int, width: int) -> int:
        """How many text tokens have positions next to a picture of that size (pixels)."""
        side = max(image_size_of_area(height, width, self.given_area)) // (2 * self.pixels_per_latent)
        return POSITIONS - side // 2
