"""Per-channel normalization of latents by statistics in a VAE's config.json."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def channel_statistics(mean: Sequence[float], std: Sequence[float], like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (1, C, 1, ...), with `like`'s dtype, device and number of dimensions."""
    shape = (1, -1, *[1] * (like.ndim - 2))
    of_mean, of_std = (torch.tensor(values).view(shape).to(like) for values in (mean, std))
    return of_mean, of_std


def normalized(latents: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalize a VAE's latents (B, C, ...). Multiplies by 1 / std as Diffusers does, for equal rounding."""
    of_mean, of_std = channel_statistics(mean, std, latents)
    return (latents - of_mean) * (1.0 / of_std)


def denormalized(latents: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo normalized(). Divides by 1 / std as Diffusers does, for equal rounding."""
    of_mean, of_std = channel_statistics(mean, std, latents)
    return latents / (1.0 / of_std) + of_mean
