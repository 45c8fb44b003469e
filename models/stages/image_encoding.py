"""Encodes a request's images to conditioning and to latents."""

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
from models.images import as_tensor, center_crop, open_images
from models.media import recompressed
from models.runtime import Runtime
from models.stages.first_draw import first_draw

_FILTERS: Mapping[str, Image.Resampling] = {
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
}


class ImageEncodingStage(PipelineStage[ImageEncodingInput, ImageEncodingOutput]):
    """Runs the vision encoder on all images as one batch; the image processor resizes and crops them."""

    def __init__(self, config: VisionConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._config = config
        self._device, self._dtype = runtime.device, runtime.dtype
        self._encoder, self._processor = modules["image_encoder"], modules["image_processor"]
        check_vision_processor("image_processor", self._processor, "image_encoder", self._encoder)

    @torch.inference_mode()
    def run(self, x: ImageEncodingInput, call: Call) -> ImageEncodingOutput:
        """Conditioning of batch 1 on the CPU, for both branches. Raises InvalidInput for undecodable images."""
        call.check_cancelled()
        images = list(open_images(x.image_inputs).values())
        pixels = self._processor(images=images, return_tensors="pt").pixel_values
        output = self._encoder(pixels.to(self._device, self._dtype), output_hidden_states=True)
        embeds = self._config.vision_tokens(output.hidden_states)
        on_cpu = {name: value.to("cpu", self._dtype) for name, value in embeds.items()}
        return ImageEncodingOutput(image_conditioning=Conditioning(prompt_embeds=on_cpu))


class ImageVAEEncodingStage(PipelineStage[ImageVAEEncodingInput, ImageVAEEncodingOutput]):
    """Resizes the images as the model requires and encodes them with the VAE."""

    def __init__(self, config: ImageLatentsConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._config = config
        self._device = runtime.device
        self._dtype = config.dtype_of("vae", runtime.dtype)
        self._vae = modules["vae"]

    @torch.inference_mode()
    def run(self, x: ImageVAEEncodingInput, call: Call) -> ImageVAEEncodingOutput:
        """Latents of batch 1 on the CPU: the mode or a sample of the VAE's distribution.

        Raises InvalidInput for undecodable images, and for images that are too small to compress.
        """
        call.check_cancelled()
        tensors: dict[str, Tensor] = {}
        for role, image in open_images(x.image_inputs, self._config.image_mode).items():
            size = self._config.image_size((image.height, image.width), x.canvas)
            factor = 0 if x.sampling is None else self._config.recompression(x.sampling)
            source = _recompressed(role, image, factor) if factor else image
            resized = as_tensor(source, *size, _FILTERS[self._config.resampling])
            tensors[role] = center_crop(resized, *self._config.image_crop(size)).to(self._device)
        parts = {
            part: LatentPart(latents=self._config.pack(part, raw.cpu()), raw_latent_shape=tuple(raw.shape))
            for part, raw in self._config.image_latents(self._encoder(x), tensors, x.canvas).items()
        }
        return ImageVAEEncodingOutput(image_latents=Latents(parts=parts))

    def _encoder(self, x: ImageVAEEncodingInput) -> Callable[[Tensor], Tensor]:
        """Encoder that returns the mode of the VAE's distribution, or a sample with the request's noise."""
        noise = None
        if x.sampling is not None:
            noise, _ = first_draw(self._config, x.canvas, x.sampling.seed, self._dtype)
        encode: Callable[[Tensor], Tensor]
        encode = self._vae.encode if noise is None else partial(self._vae.sample, noise=noise)
        return encode


def _recompressed(role: str, image: Image.Image, factor: int) -> Image.Image:
    """Apply H.264 compression artifacts. Raises InvalidInput with the role."""
    try:
        return recompressed(image, factor)
    except ValueError as error:
        raise InvalidInput(f"{role}: {error}", field=role) from None
