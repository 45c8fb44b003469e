"""The constants that normalise the latents of a VAE, channel by channel."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from configs.models.fields import ConfigFields

Numbers = tuple[float, ...]


def latent_statistics(
    fields: ConfigFields, z_dim: int, defaults: Mapping[str, Numbers] = MappingProxyType({})
) -> tuple[Numbers, Numbers]:
    """latents_mean and latents_std of a config.json, each (z_dim,), std without a 0. Raises CheckpointError."""
    mean, std = (fields.numbers(name, defaults.get(name, ())) for name in ("latents_mean", "latents_std"))
    for name, constants in (("latents_mean", mean), ("latents_std", std)):
        if len(constants) != z_dim:
            raise fields.error(name, f"must have a number for each of the {z_dim} latent channels")
    if not all(std):
        raise fields.error("latents_std", "must not hold a 0")
    return mean, std
