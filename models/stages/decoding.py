"""Turns latents into files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from common.artifacts import Media, MediaItem
from common.errors import InternalError, InvalidInput
from common.stage import Call, PipelineStage
from configs.pipeline_configs.base import StandardPipelineConfig
from models.contracts import DecodingInput, DecodingOutput

PNG = "image/png"
SAFETENSORS = "application/vnd.safetensors"


class DecodingStage(PipelineStage[DecodingInput, DecodingOutput]):
    """Decodes images with the VAE and encodes them: a PNG each, or one safetensors file with tensors."""

    def __init__(self, config: StandardPipelineConfig, modules: Mapping[str, Any]) -> None:
        self._config = config
        self._vae = modules["vae"]

    @torch.inference_mode()
    def run(self, x: DecodingInput, call: Call) -> DecodingOutput:
        """The finished files. Raises InvalidInput for a format that is no image's."""
        if x.canvas.output_format not in ("png", "safetensors"):
            raise InvalidInput(
                f"output_format {x.canvas.output_format!r} is not made by this model; it makes png and safetensors",
                field="output_format",
            )
        part = x.denoised_latents.parts["image"]
        pixels = self._decode(part.latents, part.raw_latent_shape)
        call.progress(1, 1)
        if x.canvas.output_format == "safetensors":
            tensors = {"latents": part.latents.contiguous(), "pixels": pixels}
            files = [MediaItem(data=_bytes(save(tensors)), content_type=SAFETENSORS, **_size(pixels))]
        else:
            files = [MediaItem(data=_bytes(_png(each)), content_type=PNG, **_size(pixels)) for each in pixels]
        return DecodingOutput(media=Media(items=tuple(files)))

    def _decode(self, latents: Tensor, raw_latent_shape: tuple[int, ...]) -> Tensor:
        """Pixels in [0, 1], float32 (outputs, 3, height, width), on the CPU. Raises InternalError for NaN."""
        raw = self._config.unpack(latents.to(self._config.device), raw_latent_shape)
        decoded: Tensor = self._vae.decode(self._config.vae_latents(raw), return_dict=False)[0]
        pixels = (decoded * 0.5 + 0.5).clamp(0, 1).float().cpu().contiguous()
        if not pixels.isfinite().all():
            raise InternalError("the model made pixels that are no numbers: its weights or latents overflowed")
        return pixels


def _png(pixels: Tensor) -> bytes:
    """Encode (3, height, width); half values round to even, as Diffusers' do."""
    rgb = (pixels.permute(1, 2, 0) * 255).round().to(torch.uint8)
    file = io.BytesIO()
    Image.fromarray(rgb.numpy()).save(file, "PNG")
    return file.getvalue()


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _size(pixels: Tensor) -> dict[str, int]:
    return {"height": pixels.shape[-2], "width": pixels.shape[-1]}
