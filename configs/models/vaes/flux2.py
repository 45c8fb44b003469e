"""Architecture of Diffusers' AutoencoderKLFlux2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from configs.models.fields import ConfigFields

MAX_PIXELS = 1024 * 1024
"""Maximum area of a reference image for the VAE, in pixels."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLFlux2Config:
    """Entries of AutoencoderKLFlux2's config.json that determine the latents.

    A latent covers `spatial_factor` pixels along each side.
    """

    latent_channels: int = 32
    spatial_factor: int = 8

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Parse config.json. Raises CheckpointError."""
        fields = ConfigFields(module, values)
        if fields.integers("patch_size", (2, 2)) != (2, 2):
            raise fields.error("patch_size", "[2, 2], the only supported value")
        return cls(
            latent_channels=fields.integer("latent_channels", cls.latent_channels),
            spatial_factor=2 ** (len(fields.integers("block_out_channels", (128, 256, 512, 512))) - 1),
        )


def area_limited(height: int, width: int) -> tuple[int, int]:
    """Reduce height and width (pixels) to an area of at most MAX_PIXELS, preserving the aspect ratio."""
    if height * width <= MAX_PIXELS:
        return height, width
    scale = math.sqrt(MAX_PIXELS / (width * height))
    return int(height * scale), int(width * scale)
