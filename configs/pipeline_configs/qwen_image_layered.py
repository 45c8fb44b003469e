"""Qwen-Image-Layered, a hybrid model: decomposes an image into transparent layers.

The first latent frame of an output is the whole image, which the loop regenerates and decoding drops. The other frames
are the layers; `Canvas.num_frames` is their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from configs.pipeline_configs.base import NEGATIVE, POSITIVE, ImageLatentsConfig, Keywords, Parts, Shapes, Step
from configs.pipeline_configs.packed import CONDITION, PackedPipelineConfig
from configs.pipeline_configs.qwen_image import QwenImagePipelineConfig, positions, text_positions

if TYPE_CHECKING:
    from common.artifacts import Canvas, Sampling

BASE_TOKENS = 256
"""Number of tokens of a frame at which the schedule's shift mu is 1."""
INPUT_FRAME = -1
"""Frame position of the input image."""


@dataclass(frozen=True, kw_only=True)
class QwenImageLayeredPipelineConfig(QwenImagePipelineConfig, ImageLatentsConfig):
    """QwenImageLayeredPipeline's callbacks; an input image follows the noise tokens."""

    title: ClassVar[str] = "Qwen-Image-Layered"
    deviations: ClassVar[str] = (
        "Latents are returned, where Diffusers raises. The caption for an empty prompt is decoded greedily, so that it "
        "is reproducible. A single step is rejected, as it is NaN in Diffusers."
    )

    module_loaders: ClassVar[Mapping[str, str]] = {
        **QwenImagePipelineConfig.module_loaders,
        "Qwen2_5_VLForConditionalGeneration": "models.encoder_runners.captions:load_captioning_model",
    }
    transformer_flags: ClassVar[Mapping[str, bool]] = {"zero_cond_t": False, "use_layer3d_rope": True}
    channels: ClassVar[int] = 4
    image_mode: ClassVar[Literal["RGB", "RGBA"]] = "RGBA"

    def raw_latent_shapes(self, canvas: Canvas, batch: int) -> Shapes:
        """(batch, 1 + layers, channels, rows, columns)."""
        ((part, (_, _, *shape)),) = super().raw_latent_shapes(canvas, batch).items()
        return {part: (batch, 1 + canvas.num_frames, *shape)}

    def condition_shapes(self, canvas: Canvas) -> Shapes:
        """The input image in the size of a layer."""
        ((_, (_, _, *shape)),) = super().raw_latent_shapes(canvas, 1).items()
        return {CONDITION: (1, 1, *shape)}

    def image_latents(self, encode: Callable[[Tensor], Tensor], images: Mapping[str, Tensor], canvas: Canvas) -> Parts:
        """Normalized latents of the image, with frames before channels as in the noise: (1, 1, C, 2h, 2w)."""
        del canvas
        return {CONDITION: self._normalized(encode(images["image"][:, :, None]))}

    def sigmas(self, sampling: Sampling) -> Sequence[float]:
        """The request's sigmas, or evenly spaced from 1 to 0, excluding 0."""
        steps = sampling.num_inference_steps
        return sampling.sigmas or np.linspace(1.0, 0.0, steps + 1)[:-1].tolist()

    def mu(self, canvas: Canvas) -> float:
        """sqrt(tokens of a layer / BASE_TOKENS); the scheduler's bounds have no effect."""
        return math.sqrt(math.prod(self.patches(canvas)) / BASE_TOKENS)

    def prepare_pos_cond_kwargs(self, embeds: Parts, shapes: Shapes, sampling: Sampling) -> Keywords:
        """Positions (frame, row, column) relative to each frame's center; the input image is frame -1."""
        del sampling
        _, frames, _, *size = shapes["image"]
        rows, columns = (side // 2 for side in size)
        return {
            "txt_ids": text_positions(embeds, max(rows // 2, columns // 2, frames)),
            "img_ids": torch.cat([positions(frame, rows, columns) for frame in range(frames)]),
            "condition_ids": positions(INPUT_FRAME, rows, columns),
        }

    def guide(self, predictions: Mapping[str, Parts], latents: Parts, step: Step, sampling: Sampling) -> Parts:
        """True classifier-free guidance; with cfg_normalize, it preserves the positive prediction's norm."""
        if sampling.params.get("cfg_normalize"):
            return super().guide(predictions, latents, step, sampling)
        positive, negative = predictions[POSITIVE]["image"], predictions[NEGATIVE]["image"]
        return {"image": PackedPipelineConfig.guided(self, positive, negative, sampling.true_cfg_scale or 1.0)}

    def vae_latents(self, raw: Tensor) -> Tensor:
        """Drop the whole image; layers become images: (B, C, 1 + n, 2h, 2w) to (B * n, C, 1, 2h, 2w)."""
        layers = raw[:, :, 1:].transpose(1, 2).flatten(0, 1)
        return super().vae_latents(layers[:, :, None])

    def saved_pixels(self, pixels: Tensor, outputs: int) -> Tensor:
        """Group images by output: (outputs, layers, 4, height, width)."""
        return pixels.reshape(outputs, -1, *pixels.shape[1:])

    def num_frames(self, canvas: Canvas) -> int:
        """1: each layer is a separate file."""
        del canvas
        return 1
