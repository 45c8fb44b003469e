"""Callbacks of the DMD denoising loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from common.errors import InvalidInput
from configs.pipeline_configs.base import POSITIVE, DenoisingConfig

TRAINING_STEPS = 1000
"""Number of timesteps of the flow schedule in training."""


class DmdConfig(DenoisingConfig):
    """A few-step model without guidance; steps predict clean latents and add new noise, in float32."""

    prediction_dtype: ClassVar[torch.dtype | None] = torch.float32
    branches: ClassVar[tuple[str, ...]] = (POSITIVE,)

    def draw_noise(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw noise for latents of this shape, float32 on the CPU."""
        return torch.randn(shape, generator=generator, dtype=torch.float32)


class CausalDmdConfig(DmdConfig):
    """A model that denoises a video block by block.

    The denoiser's predict() takes the block's latents (B, channels, frames, rows, columns) and the static flag
    `first_frame`, the number of preceding frames. The KV cache contains the keys and values of the preceding frames to
    which the block attends. It is sharded by heads; therefore `parallel_axes` of a subclass must not include "ring".
    """

    has_step_cache = False

    @property
    def frames_per_block(self) -> int:
        """Number of latent frames of a block."""
        raise TypeError(f"{type(self).__name__} does not define frames_per_block")

    def blocks_of(self, latents: Tensor) -> int:
        """Number of blocks of a video's latents (B, channels, frames, rows, columns).

        Raises InvalidInput if the frames do not fill whole blocks.
        """
        frames, size = latents.shape[2], self.frames_per_block
        if frames % size or not frames:
            message = f"initial_latents: {frames} latent frames are not a multiple of {size}, the frames of a block"
            raise InvalidInput(f"{message}; {max(1, frames // size) * size} works", field="initial_latents")
        return frames // size

    def frames_of(self, block: int) -> slice:
        """The range of a block's latent frames."""
        return slice(block * self.frames_per_block, (block + 1) * self.frames_per_block)


def flow_levels(shift: float) -> list[float]:
    """Noise levels of the shifted flow schedule with TRAINING_STEPS steps, descending."""
    even = [(TRAINING_STEPS - step) / TRAINING_STEPS for step in range(TRAINING_STEPS)]
    return [shift * level / (1 + (shift - 1) * level) for level in even]


def nearest_levels(timesteps: Sequence[float], shift: float) -> list[tuple[float, float]]:
    """Pair each timestep with the shifted schedule's level nearest to timestep / TRAINING_STEPS."""
    levels = flow_levels(shift)
    return [(each, min(levels, key=lambda level: abs(TRAINING_STEPS * level - each))) for each in timesteps]


def warped_levels(timesteps: Sequence[float], shift: float) -> list[tuple[float, float]]:
    """Map timesteps (1 to TRAINING_STEPS) of the unshifted schedule to shifted timesteps and levels."""
    levels = [flow_levels(shift)[TRAINING_STEPS - round(each)] for each in timesteps]
    return [(TRAINING_STEPS * level, level) for level in levels]
