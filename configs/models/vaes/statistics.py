"""Per-channel statistics that normalize a VAE's latents."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from configs.models.fields import ConfigFields

Numbers = tuple[float, ...]


def latent_statistics(
    fields: ConfigFields, z_dim: int, defaults: Mapping[str, Numbers] = MappingProxyType({})
) -> tuple[Numbers, Numbers]:
    """Parse latents_mean and latents_std, each of length z_dim. Raises CheckpointError, also for a std of 0."""
    mean, std = (fields.numbers(name, defaults.get(name, ())) for name in ("latents_mean", "latents_std"))
    for name, constants in (("latents_mean", mean), ("latents_std", std)):
        if len(constants) != z_dim:
            raise fields.error(name, f"a list of {z_dim} numbers, one per latent channel")
    if not all(std):
        raise fields.error("latents_std", "a list without 0")
    return mean, std
