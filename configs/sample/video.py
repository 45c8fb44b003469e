"""Sampling parameters shared by video models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from configs.models.vaes.frames import FrameGrid
from configs.sample.base import ParamWarning, SamplingParams, parameter


@dataclass(frozen=True, kw_only=True)
class VideoSamplingParams(SamplingParams):
    """Parameters of a video. max_total_pixels bounds the pixels of all frames of all outputs."""

    output_formats: ClassVar[tuple[str, ...]] = ("mp4", "safetensors")
    max_total_pixels: ClassVar[int] = 2**28

    num_frames: int = parameter("Number of frames.", minimum=1, maximum=4093)
    frame_rate: float = parameter("Frames per second of the video.", 24.0, minimum=1.0, maximum=240.0)

    @property
    def extent(self) -> dict[str, int]:
        """Height, width and frames."""
        return {**super().extent, "num_frames": self.num_frames}

    def with_whole_latent_frames(self, vae: FrameGrid) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Round frames down to whole latent frames, with a warning."""
        frames = vae.whole_frames(self.num_frames)
        if frames == self.num_frames:
            return self, ()
        rule = f"is not one more than a multiple of {vae.temporal_factor}"
        message = f"{self.num_frames} {rule}; {frames} is used instead"
        return replace(self, num_frames=frames), (ParamWarning("num_frames", message),)
