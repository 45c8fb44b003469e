"""The first draw of a request, of models that draw the latents of an image: before the starting noise."""

from __future__ import annotations

import torch
from torch import Tensor

from common.artifacts import Canvas
from configs.pipeline_configs.base import LatentLayout


def first_draw(
    config: LatentLayout, canvas: Canvas, seed: int, vae_dtype: torch.dtype
) -> tuple[Tensor | None, torch.Generator]:
    """The noise for the image's latents, if the model draws them, and the request's generator after this draw.

    Image encoding uses the noise, latent preparation the generator: neither waits for the other.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = config.posterior_shape(canvas)
    return None if shape is None else torch.randn(shape, generator=generator, dtype=vae_dtype), generator
