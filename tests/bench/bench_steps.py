"""Steps of one request on one of our denoisers, as the denoising stage runs them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor

from models.dits.base import DiffusionTransformer, Predictions
from models.runtime import DEFAULT_STEP_MEMORY_BYTES
from models.stages.predictor import StepCaching, lease_branch
from models.stages.step_memory import StepMemoryPool, cuda_capture

HIDDEN_STATES = "hidden_states"
"""Argument name of the latents in most denoisers."""


def new_pool(device: torch.device) -> StepMemoryPool:
    """A pool of step memory, with CUDA graphs on a GPU."""
    return StepMemoryPool(DEFAULT_STEP_MEMORY_BYTES, cuda_capture() if device.type == "cuda" else None)


class RequestSteps:
    """A prepared request. `latents` are by argument name; close() returns its memory to the pool."""

    def __init__(
        self,
        pool: StepMemoryPool,
        ours: DiffusionTransformer,
        timesteps: Tensor,
        inputs: Mapping[str, Any],
        latents: Mapping[str, Tensor],
        caching: StepCaching | None = None,
    ) -> None:
        self._resources = ExitStack()
        lease = self._resources.enter_context(pool.leases())
        prepared = ours.prepare(timesteps, **inputs)
        self._branch = lease_branch(lease, "transformer", ours, prepared, latents, caching=caching)

    def predict(self, hidden_states: Tensor, step: int) -> Tensor:
        """Predict a step of a denoiser with one latent part."""
        return self.predict_parts({HIDDEN_STATES: hidden_states}, step)[HIDDEN_STATES]

    def predict_parts(self, latents: Mapping[str, Tensor], step: int) -> Predictions:
        """Predict a step; `latents` are by argument name of each latent part."""
        return self._branch.predict(latents, step)

    @property
    def reused(self) -> int:
        """Number of predictions that reused residuals of earlier steps."""
        return self._branch.reused

    def close(self) -> None:
        """Return the memory to the pool."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
