"""Architecture of Diffusers' AutoencoderKL."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from configs.models.fields import ConfigFields


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig:
    """Entries of AutoencoderKL's config.json that determine the latents.

    The denoiser's latents are (z - shift_factor) * scaling_factor. A latent covers `spatial_factor` pixels along each
    side.
    """

    latent_channels: int
    spatial_factor: int
    scaling_factor: float
    shift_factor: float

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Parse config.json. Raises CheckpointError."""
        fields = ConfigFields(module, values)
        scaling = fields.number("scaling_factor", 0.18215)
        if scaling == 0:
            raise fields.error("scaling_factor", "a number other than 0")
        return cls(
            latent_channels=fields.integer("latent_channels", 4),
            spatial_factor=2 ** (len(fields.integers("block_out_channels", (64,))) - 1),
            scaling_factor=scaling,
            shift_factor=fields.number("shift_factor", 0.0),
        )
