"""What the stages need to know of Diffusers' AutoencoderKLHunyuanVideo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from configs.models.fields import ConfigFields


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLHunyuanVideoConfig:
    """AutoencoderKLHunyuanVideo's config.json, as far as latents depend on it.

    A latent z is stored as z * scaling_factor. The first frame has a latent frame of its own, every further latent
    frame stands for `temporal_factor` frames; `spatial_factor` pixels a side make one latent.
    """

    latent_channels: int
    spatial_factor: int
    temporal_factor: int
    scaling_factor: float

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Read config.json of the module. Raises CheckpointError."""
        fields = ConfigFields(module, values)
        scaling = fields.number("scaling_factor", 0.476986)
        if scaling == 0:
            raise fields.error("scaling_factor", "must not be 0")
        return cls(
            latent_channels=fields.integer("latent_channels", 16),
            spatial_factor=fields.integer("spatial_compression_ratio", 8),
            temporal_factor=fields.integer("temporal_compression_ratio", 4),
            scaling_factor=scaling,
        )

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a video."""
        return (num_frames - 1) // self.temporal_factor + 1

    def whole_frames(self, num_frames: int) -> int:
        """Frames that are decoded from as many latent frames as a video of `num_frames` has."""
        return (self.latent_frames(num_frames) - 1) * self.temporal_factor + 1
