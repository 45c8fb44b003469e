"""Architecture of Diffusers' AutoencoderKLWan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from configs.models.fields import ConfigFields
from configs.models.vaes.frames import FrameGrid
from configs.models.vaes.statistics import latent_statistics


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLWanConfig(FrameGrid):
    """Entries of AutoencoderKLWan's config.json that determine the shape and the scale of the latents.

    The denoiser's latents are (z - mean) / std, per channel. A latent covers `spatial_factor` pixels along each side: 8
    for Wan 2.1's VAE, 16 for Wan 2.2 TI2V-5B's VAE, which encodes patches of 2x2 pixels as channels (`patch_size`).
    """

    z_dim: int
    spatial_factor: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Parse config.json. Raises CheckpointError, also for contradictory entries."""
        fields = ConfigFields(module, values)
        z_dim = fields.integer("z_dim", 16)
        mean, std = latent_statistics(fields, z_dim, _WAN_21)
        temporal_factor, spatial_factor = _factors(fields)
        return cls(
            z_dim=z_dim,
            temporal_factor=temporal_factor,
            spatial_factor=spatial_factor,
            latents_mean=mean,
            latents_std=std,
        )


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
"""Statistics of the published VAE, which its config.json may omit."""


def _factors(fields: ConfigFields) -> tuple[int, int]:
    """Temporal factor (frames) and spatial factor (pixels) of a latent.

    Diffusers computes the size of latents from scale_factor_*, but dim_mult, patch_size and temperal_downsample
    determine the layers. If the entries contradict each other, the video would not have the requested size. Raises
    CheckpointError.
    """
    fields.flag("is_residual", False)
    patch_size = fields.integer("patch_size", 1)
    for name in ("in_channels", "out_channels"):
        if fields.integer(name, 3) != 3 * patch_size**2:
            raise fields.error(name, f"{3 * patch_size**2}, the 3 colors of {patch_size}x{patch_size} pixels")
    levels = len(fields.integers("dim_mult", (1, 2, 4, 4))) - 1
    halved = fields.flags("temperal_downsample", (False, True, True))
    if len(halved) != levels:
        raise fields.error("temperal_downsample", f"a list of {levels} entries, one fewer than dim_mult")
    temporal = fields.integer("scale_factor_temporal", 4)
    if temporal != 2 ** sum(halved):
        raise fields.error("scale_factor_temporal", f"{2 ** sum(halved)}, the factor of temperal_downsample")
    spatial = fields.integer("scale_factor_spatial", 8)
    if spatial != patch_size * 2**levels:
        raise fields.error("scale_factor_spatial", f"{patch_size * 2**levels}, the factor of dim_mult and patch_size")
    return temporal, spatial
