"""What the stages need to know of Diffusers' AutoencoderKLLTXVideo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from configs.models.fields import ConfigFields
from configs.models.vaes.frames import FrameGrid

_SCALES = (True, True, True, False)


@dataclass(frozen=True, kw_only=True)
class LTXVideoVAEConfig(FrameGrid):
    """AutoencoderKLLTXVideo's config.json, as far as latents depend on it.

    `spatial_factor` pixels a side make one latent. Latents are normalised with statistics among the weights. A decoder
    with `removes_noise` (0.9.5) is conditioned on a timestep, and its latents get noise.
    """

    latent_channels: int
    spatial_factor: int
    removes_noise: bool

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Read config.json of the module. Raises CheckpointError, also where entries contradict each other."""
        fields = ConfigFields(module, values)
        fields.only("patch_size_t", 1)
        if any(fields.flags("decoder_inject_noise", (False,))):
            raise fields.error("decoder_inject_noise", "is not supported: layers that draw noise follow no seed")
        if fields.number("scaling_factor", 1.0) == 0:
            raise fields.error("scaling_factor", "must not be 0")
        patch = fields.integer("patch_size", 4)
        temporal = 2 ** sum(fields.flags("decoder_spatio_temporal_scaling", _SCALES))
        encoded = 2 ** sum(fields.flags("spatio_temporal_scaling", _SCALES))
        pairs = {
            "spatial_compression_ratio": (patch * encoded, patch * temporal),
            "temporal_compression_ratio": (encoded, temporal),
        }
        for name, (default, made) in pairs.items():
            if fields.integer(name, default) != made:
                raise fields.error(name, f"must be {made}, as the decoder's layers say")
        return cls(
            latent_channels=fields.integer("latent_channels", 128),
            spatial_factor=patch * temporal,
            temporal_factor=temporal,
            removes_noise=fields.flag("timestep_conditioning", False),
        )
