"""Architecture of Diffusers' AutoencoderKLQwenImage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from configs.models.fields import ConfigFields
from configs.models.vaes.statistics import latent_statistics

IMAGE_AREA = 1024 * 1024
"""Default area of a resized input image, in pixels."""
_IMAGE_MULTIPLE = 32


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLQwenImageConfig:
    """Entries of AutoencoderKLQwenImage's config.json that determine the latents.

    It is a video VAE; an image is a video of one frame. The denoiser's latents are (z - mean) / std, per channel. A
    latent covers `spatial_factor` pixels along each side.
    """

    z_dim: int
    spatial_factor: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any], channels: int = 3) -> Self:
        """Parse config.json, for images with `channels` channels. Raises CheckpointError."""
        fields = ConfigFields(module, values)
        if fields.integer("input_channels", 3) != channels:
            raise fields.error("input_channels", f"{channels}, the only supported value")
        z_dim = fields.integer("z_dim", 16)
        mean, std = latent_statistics(fields, z_dim)
        return cls(
            z_dim=z_dim,
            spatial_factor=spatial_factor(fields),
            latents_mean=mean,
            latents_std=std,
        )


def spatial_factor(fields: ConfigFields) -> int:
    """Pixels along each side of a latent, from the encoder's downsampling layers. Raises CheckpointError."""
    return 1 << len(fields.flags("temperal_downsample", (False, True, True)))


def image_size_of_area(height: int, width: int, area: int = IMAGE_AREA) -> tuple[int, int]:
    """Height and width (multiples of 32 pixels) for about `area` pixels and about the same aspect ratio."""
    exact_width = math.sqrt(area * (width / height))
    exact_height = exact_width / (width / height)
    return round(exact_height / _IMAGE_MULTIPLE) * _IMAGE_MULTIPLE, round(
        exact_width / _IMAGE_MULTIPLE
    ) * _IMAGE_MULTIPLE
