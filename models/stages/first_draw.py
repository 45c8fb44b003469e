"""The first draw of a request's generator: noise for image latents, before the initial noise."""

from __future__ import annotations

import torch
from torch import Tensor

from common.artifacts import Canvas
from configs.pipeline_configs.base import LatentLayout


def first_draw(
    config: LatentLayout, canvas: Canvas, seed: int, vae_dtype: torch.dtype
) -> tuple[Tensor | None, torch.Generator]:
    """Draw the noise for sampling image latents, if the model samples them.

    Returns the noise or None, and the request's generator after this draw. Image encoding uses the noise, and latent
    preparation uses the generator. Both stages call this function, so that neither depends on the other.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    shape = config.posterior_shape(canvas)
    return None if shape is None else torch.randn(shape, generator=generator, dtype=vae_dtype), generator
