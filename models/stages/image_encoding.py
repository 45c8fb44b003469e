"""Turns the pictures of a request into conditioning, and into latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from common.artifacts import Conditioning, LatentPart, Latents
from common.errors import InvalidInput
from common.stage import Call, PipelineStage
from configs.pipeline_configs.base import ImageLatentsConfig, VisionConfig
from models.contracts import (
    ImageEncodingInput,
    ImageEncodingOutput,
    ImageVAEEncodingInput,
    ImageVAEEncodingOutput,
)
from models.encoder_runners.checks import check_vision_processor
from models.images import as_tensor, middle, open_images
from models.media import recompressed
from models.runtime import Runtime
from models.stages.first_draw import first_draw

_FILTERS: Mapping[str, Image.Resampling] = {
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
}


class ImageEncodingStage(PipelineStage[ImageEncodingInput, ImageEncodingOutput]):
    """Runs the model's vision encoder on all pictures at once, each in its own size before the encoder's crop."""

    def __init__(self, config: VisionConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._config = config
        self._device, self._dtype = runtime.device, runtime.dtype
        self._encoder, self._processor = modules["image_encoder"], modules["image_processor"]
        check_vision_processor("image_processor", self._processor, "image_encoder", self._encoder)

    @torch.inference_mode()
    def run(self, x: ImageEncodingInput, call: Call) -> ImageEncodingOutput:
        """Batch 1, on the CPU. The negative branch sees the same pictures. Raises InvalidInput for unreadable ones."""
        call.check_cancelled()
        pictures = list(open_images(x.image_inputs).values())
        pixels = self._processor(images=pictures, return_tensors="pt").pixel_values
        output = self._encoder(pixels.to(self._device, self._dtype), output_hidden_states=True)
        embeds = self._config.vision_tokens(output.hidden_states)
        moved = {name: value.to("cpu", self._dtype) for name, value in embeds.items()}
        return ImageEncodingOutput(image_conditioning=Conditioning(prompt_embeds=moved))


class ImageVAEEncodingStage(PipelineStage[ImageVAEEncodingInput, ImageVAEEncodingOutput]):
    """Runs the VAE's encoder on the pictures, in the size and arrangement that the model wants them in."""

    def __init__(self, config: ImageLatentsConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._config = config
        self._device = runtime.device
        self._dtype = config.dtype_of("vae", runtime.dtype)
        self._vae = modules["vae"]

    @torch.inference_mode()
    def run(self, x: ImageVAEEncodingInput, call: Call) -> ImageVAEEncodingOutput:
        """Batch 1, on the CPU. The likeliest latents are taken, or a sample if the model draws one."""
        call.check_cancelled()
        tensors: dict[str, Tensor] = {}
        for role, picture in open_images(x.image_inputs, self._config.image_mode).items():
            size = self._config.image_size((picture.height, picture.width), x.canvas)
            factor = 0 if x.sampling is None else self._config.recompression(x.sampling)
            seen = _recompressed(role, picture, factor) if factor else picture
            whole = as_tensor(seen, *size, _FILTERS[self._config.resampling])
            tensors[role] = middle(whole, *self._config.image_crop(size)).to(self._device)
        parts = {
            part: LatentPart(latents=self._config.pack(part, raw.cpu()), raw_latent_shape=tuple(raw.shape))
            for part, raw in self._config.image_latents(self._encoder(x), tensors, x.canvas).items()
        }
        return ImageVAEEncodingOutput(image_latents=Latents(parts=parts))

    def _encoder(self, x: ImageVAEEncodingInput) -> Callable[[Tensor], Tensor]:
        """The VAE's, for the image as this request needs it."""
        noise = None
        if x.sampling is not None:
            noise, _ = first_draw(self._config, x.canvas, x.sampling.seed, self._dtype)
        encode: Callable[[Tensor], Tensor]
        encode = self._vae.encode if noise is None else partial(self._vae.sample, noise=noise)
        return encode


def _recompressed(role: str, picture: Image.Image, factor: int) -> Image.Image:
    """The compressed image. Raises InvalidInput about the role."""
    try:
        return recompressed(picture, factor)
    except ValueError as error:
        raise InvalidInput(f"{role}: {error}", field=role) from None
