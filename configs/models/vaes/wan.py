"""What the stages need to know of Diffusers' AutoencoderKLWan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from configs.models.fields import ConfigFields
from configs.models.vaes.statistics import latent_statistics


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLWanConfig:
    """AutoencoderKLWan's config.json, as far as latents depend on it.

    A latent z is stored as (z - mean) / std, per channel. The first frame has a latent frame of its own, every further
    latent frame stands for `temporal_factor` frames.
    """

    z_dim: int
    temporal_factor: int
    spatial_factor: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Read config.json of the module. Raises CheckpointError."""
        fields = ConfigFields(module, values)
        fields.only("is_residual", False)
        z_dim = fields.integer("z_dim", 16)
        mean, std = latent_statistics(fields, z_dim, _WAN_21)
        return cls(
            z_dim=z_dim,
            temporal_factor=fields.integer("scale_factor_temporal", 4),
            spatial_factor=fields.integer("scale_factor_spatial", 8),
            latents_mean=mean,
            latents_std=std,
        )

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a video."""
        return (num_frames - 1) // self.temporal_factor + 1


_WAN_21: Mapping[str, tuple[float, ...]] = {
    "latents_mean": (
        *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
        *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
    ),
    "latents_std": (
        *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
        *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
    ),
}
"""The published VAE's constants, which its config.json may leave out."""
