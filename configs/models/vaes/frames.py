"""How frames of a video become latent frames."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FrameGrid:
    """The first frame has a latent frame of its own, every further latent frame stands for `temporal_factor` frames."""

    temporal_factor: int

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a video."""
        return (num_frames - 1) // self.temporal_factor + 1

    def whole_frames(self, num_frames: int) -> int:
        """Frames that are decoded from as many latent frames as a video of `num_frames` has."""
        return (self.latent_frames(num_frames) - 1) * self.temporal_factor + 1
