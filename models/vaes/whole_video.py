"""Decoding sessions of VAEs that decode all latents at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class WholeVideoSession:
    """Collects the latents of one video, which arrive in parts, and decodes them at once.

    `decode` decodes latents (1, C, num_latent_frames, h, w) to frames (3, H, W).
    """

    def __init__(self, decode: Callable[[Tensor], Iterator[Tensor]], num_latent_frames: int) -> None:
        self._decode = decode
        self._missing = num_latent_frames
        self._parts: list[Tensor] = []

    def feed(self, latents: Tensor) -> Iterator[Tensor]:
        """Collect latents (1, C, frames, h, w); after the last ones, yield all frames.

        Raises ValueError for more latent frames than `num_latent_frames`.
        """
        self._parts.append(latents)
        self._missing -= latents.shape[2]
        if self._missing < 0:
            raise ValueError(f"latents: {latents.shape[2]} frames are {-self._missing} more than the video has left")
        if not self._missing:
            yield from self._decode(torch.cat(self._parts, dim=2))
            self._parts = []
