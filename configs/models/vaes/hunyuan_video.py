"""Architecture of Diffusers' AutoencoderKLHunyuanVideo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from configs.models.fields import ConfigFields
from configs.models.vaes.frames import FrameGrid


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLHunyuanVideoConfig(FrameGrid):
    """Entries of AutoencoderKLHunyuanVideo's config.json that determine the latents.

    The denoiser's latents are z * scaling_factor. A latent covers `spatial_factor` pixels along each side.
    """

    latent_channels: int
    spatial_factor: int
    scaling_factor: float

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Parse config.json. Raises CheckpointError."""
        fields = ConfigFields(module, values)
        scaling = fields.number("scaling_factor", 0.476986)
        if scaling == 0:
            raise fields.error("scaling_factor", "a number other than 0")
        return cls(
            latent_channels=fields.integer("latent_channels", 16),
            spatial_factor=fields.integer("spatial_compression_ratio", 8),
            temporal_factor=fields.integer("temporal_compression_ratio", 4),
            scaling_factor=scaling,
        )
