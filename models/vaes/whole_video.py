"""Decoding of videos whose VAE needs all latents at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class WholeVideoSession:
    """Decodes one video whose latents arrive in parts, once all are there.

    `decode` makes frames (3, H, W) of latents (1, C, num_latent_frames, h, w).
    """

    def __init__(self, decode: Callable[[Tensor], Iterator[Tensor]], num_latent_frames: int) -> None:
        self._decode = decode
        self._missing = num_latent_frames
        self._parts: list[Tensor] = []

    def feed(self, latents: Tensor) -> Iterator[Tensor]:
        """No frames, and with the last latents (1, C, frames, h, w) all of them. Raises ValueError beyond these."""
        self._parts.append(latents)
        self._missing -= latents.shape[2]
        if self._missing < 0:
            raise ValueError(f"latents: {latents.shape[2]} frames are {-self._missing} more than are missing")
        if not self._missing:
            yield from self._decode(torch.cat(self._parts, dim=2))
            self._parts = []
