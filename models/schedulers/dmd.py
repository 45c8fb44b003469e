"""Solver of models distilled by distribution matching (DMD): predict clean latents, add new noise.

Sources: DMD2 (arXiv 2405.14867), FastVideo's DmdDenoisingStage, Self Forcing (arXiv 2506.08009).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from common.artifacts import Schedule
from common.errors import InvalidInput
from models.schedulers.solver import check_empty


class DrawNoise(Protocol):
    """Draws noise on the CPU."""

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Standard normal noise of this shape, float32."""


class DmdSolver:
    """The solver of one latent part. After the last step it restarts with the next block of frames.

    Its only state is the step counter; the noise comes from the request's generator.
    """

    def __init__(self, draw: DrawNoise, schedule: Schedule) -> None:
        self._draw = draw
        self._sigmas = schedule.sigmas.tolist()
        self._total = schedule.num_inference_steps
        self._done = 0

    def step(
        self, prediction: Tensor, timestep: Tensor, latents: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Predict clean latents and add noise of the next level, except at the last step; float32.

        Raises InvalidInput without a generator.
        """
        del timestep
        if generator is None:
            raise InvalidInput(
                "latents_generator: None is not a generator, which a DMD loop needs to draw noise",
                field="latents_generator",
            )
        index = self._done % self._total
        self._done += 1
        clean: Tensor = latents.float() - self._sigmas[index] * prediction.float()
        if index + 1 == self._total:
            return clean
        sigma = self._sigmas[index + 1]
        noise = self._draw(tuple(latents.shape), generator).to(latents.device)
        noised: Tensor = (1.0 - sigma) * clean + sigma * noise
        return noised

    def state(self) -> Mapping[str, Tensor]:
        """Empty: the step counter is stored in the step checkpoint."""
        return {}

    def restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Set the step counter. Raises InvalidInput for the state of another solver."""
        check_empty(state)
        self._done = step
