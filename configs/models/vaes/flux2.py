"""What the stages need to know of Diffusers' AutoencoderKLFlux2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from configs.models.fields import ConfigFields

MOST_PIXELS = 1024 * 1024
"""Largest area of a reference image that the VAE encodes, in pixels."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLFlux2Config:
    """AutoencoderKLFlux2's config.json, as far as latents depend on it. `spatial_factor` pixels make one latent row."""

    latent_channels: int = 32
    spatial_factor: int = 8

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Read config.json of the module. Raises CheckpointError."""
        fields = ConfigFields(module, values)
        if fields.integers("patch_size", (2, 2)) != (2, 2):
            raise fields.error("patch_size", "is not supported; supported is [2, 2]")
        return cls(
            latent_channels=fields.integer("latent_channels", cls.latent_channels),
            spatial_factor=2 ** (len(fields.integers("block_out_channels", (128, 256, 512, 512))) - 1),
        )


def area_limited(height: int, width: int) -> tuple[int, int]:
    """Height and width (pixels) of an image, or smaller ones of its proportions for one above MOST_PIXELS."""
    if height * width <= MOST_PIXELS:
        return height, width
    scale = math.sqrt(MOST_PIXELS / (width * height))
    return int(height * scale), int(width * scale)
