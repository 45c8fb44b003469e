"""Steps of few-step models that were distilled by distribution matching (DMD): predict clean latents, add new noise.

Sources: DMD2 (arXiv 2405.14867), FastVideo's DmdDenoisingStage, Self Forcing (arXiv 2506.08009).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from common.artifacts import Schedule
from common.errors import InvalidInput


class DrawNoise(Protocol):
    """Draws noise on the CPU."""

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Standard normal noise of this shape, float32."""


class DmdSolver:
    """The solver of one latent part. After the last step of the schedule it starts over: with the next block of frames.

    It has no state besides the step counter: the noise comes from the request's generator.
    """

    def __init__(self, draw: DrawNoise, schedule: Schedule) -> None:
        self._draw = draw
        self._sigmas = schedule.sigmas.tolist()
        self._total = schedule.num_inference_steps
        self._done = 0

    def step(
        self, prediction: Tensor, timestep: Tensor, latents: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """The clean latents that a velocity predicts, with noise of the next level, float32. The last step adds none.

        Raises InvalidInput without a generator.
        """
        del timestep
        if generator is None:
            raise InvalidInput("a DMD loop draws noise, but no generator came", field="latents_generator")
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
        """Nothing."""
        return {}

    def restore(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Set the step counter. Raises InvalidInput for the state of another solver."""
        if state:
            raise InvalidInput(f"this solver has no state, but got {', '.join(state)}", field="resume_from.solver")
        self._done = step
