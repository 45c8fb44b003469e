"""Mapping between frames and latent frames of a causal video VAE."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FrameGrid:
    """The first latent frame covers one frame, each further latent frame covers `temporal_factor` frames."""

    temporal_factor: int

    def latent_frames(self, num_frames: int) -> int:
        """Number of latent frames of a video."""
        return (num_frames - 1) // self.temporal_factor + 1

    def whole_frames(self, num_frames: int) -> int:
        """Round `num_frames` down to the frames decoded from its latent frames."""
        return (self.latent_frames(num_frames) - 1) * self.temporal_factor + 1
