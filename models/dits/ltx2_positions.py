"""Positions of the LTX-2 DiT: centers of the video and audio latents, in seconds and pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from configs.models.dits.ltx2 import LTX2TransformerConfig


def video_positions(config: LTX2TransformerConfig, grid: Sequence[int], frame_rate: Tensor) -> Tensor:
    """Time (seconds), row and column (pixels) of each latent of a grid, float32 (S, 3).

    `grid` is (frames, rows, columns). `frame_rate` (1,) is in frames per second. The first latent covers
    `config.causal_offset` frames.
    """
    frames, rows, columns = (_edges(size, frame_rate.device) for size in grid)
    seconds = _causal(frames, config.temporal_factor, config.causal_offset) / frame_rate
    middles = (_middles(seconds), *(_middles(each * config.spatial_factor) for each in (rows, columns)))
    return torch.cartesian_prod(*middles)


def audio_positions(config: LTX2TransformerConfig, length: int, device: torch.device) -> Tensor:
    """Time (seconds) of each audio latent, float32 (S, 1).

    The first latent covers `config.causal_offset` spectrogram frames.
    """
    frames = _causal(_edges(length, device), config.audio_factor, config.causal_offset)
    return _middles(frames * config.audio_hop_length / config.audio_sampling_rate)[:, None]


def _edges(size: int, device: torch.device) -> Tensor:
    """Start of each latent, and the end of the last one, in latents: (size + 1,)."""
    return torch.arange(size + 1, dtype=torch.float32, device=device)


def _causal(edges: Tensor, factor: int, offset: int) -> Tensor:
    """Convert edges from latents to frames.

    The first latent covers `offset` frames, every other latent covers `factor` frames.
    """
    return (edges * factor + (offset - factor)).clamp(min=0)


def _middles(edges: Tensor) -> Tensor:
    return (edges[:-1] + edges[1:]) / 2.0
