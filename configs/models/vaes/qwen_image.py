"""What the stages need to know of Diffusers' AutoencoderKLQwenImage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from configs.models.fields import ConfigFields
from configs.models.vaes.statistics import latent_statistics

GIVEN_AREA = 1024 * 1024
_GIVEN_MULTIPLE = 32


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLQwenImageConfig:
    """AutoencoderKLQwenImage's config.json, as far as latents depend on it.

    It is the VAE of a video model; a picture is a video of one frame. A latent z is stored as (z - mean) / std, per
    channel; `spatial_factor` pixels make one latent row.
    """

    z_dim: int
    spatial_factor: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any], channels: int = 3) -> Self:
        """Read config.json of the module, for images with this number of channels. Raises CheckpointError."""
        fields = ConfigFields(module, values)
        if (found := fields.integer("input_channels", 3)) != channels:
            raise fields.error("input_channels", f"is not supported; supported is {channels}, not {found}")
        z_dim = fields.integer("z_dim", 16)
        mean, std = latent_statistics(fields, z_dim)
        return cls(
            z_dim=z_dim,
            spatial_factor=spatial_factor(fields),
            latents_mean=mean,
            latents_std=std,
        )


def spatial_factor(fields: ConfigFields) -> int:
    """Pixels a side that become one latent: the encoder halves once for each entry. Raises CheckpointError."""
    return 1 << len(fields.flags("temperal_downsample", (False, True, True)))


def given_size(height: int, width: int, area: int = GIVEN_AREA) -> tuple[int, int]:
    """Height and width to which an input image is resized: about `area` pixels, with about the same aspect ratio."""
    exact_width = math.sqrt(area * (width / height))
    exact_height = exact_width / (width / height)
    return round(exact_height / _GIVEN_MULTIPLE) * _GIVEN_MULTIPLE, round(
        exact_width / _GIVEN_MULTIPLE
    ) * _GIVEN_MULTIPLE
