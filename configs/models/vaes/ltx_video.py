"""Architecture of Diffusers' AutoencoderKLLTXVideo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from configs.models.fields import ConfigFields
from configs.models.vaes.frames import FrameGrid

_DEFAULT_SCALING = (True, True, True, False)


@dataclass(frozen=True, kw_only=True)
class LTXVideoVAEConfig(FrameGrid):
    """Entries of AutoencoderKLLTXVideo's config.json that determine the latents.

    A latent covers `spatial_factor` pixels along each side. Statistics to normalize latents are stored in the weights.
    `removes_noise` (0.9.5): noise is added to the latents, and the decoder, conditioned on a timestep, removes it.
    """

    latent_channels: int
    spatial_factor: int
    removes_noise: bool

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any]) -> Self:
        """Parse config.json. Raises CheckpointError, also for contradictory entries."""
        fields = ConfigFields(module, values)
        fields.only("patch_size_t", 1)
        if any(fields.flags("decoder_inject_noise", (False,))):
            raise fields.error("decoder_inject_noise", "all false; layers that inject noise ignore the request's seed")
        if fields.number("scaling_factor", 1.0) == 0:
            raise fields.error("scaling_factor", "a number other than 0")
        patch = fields.integer("patch_size", 4)
        temporal = 2 ** sum(fields.flags("decoder_spatio_temporal_scaling", _DEFAULT_SCALING))
        encoded = 2 ** sum(fields.flags("spatio_temporal_scaling", _DEFAULT_SCALING))
        pairs = {
            "spatial_compression_ratio": (patch * encoded, patch * temporal),
            "temporal_compression_ratio": (encoded, temporal),
        }
        for name, (default, factor) in pairs.items():
            if fields.integer(name, default) != factor:
                raise fields.error(name, f"{factor}, the factor of the decoder's layers")
        return cls(
            latent_channels=fields.integer("latent_channels", 128),
            spatial_factor=patch * temporal,
            temporal_factor=temporal,
            removes_noise=fields.flag("timestep_conditioning", False),
        )
