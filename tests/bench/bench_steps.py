"""The steps of one request on one denoiser of ours, as the denoising stage runs them."""

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
"""Keyword of the only latents of most denoisers."""


def new_pool(device: torch.device) -> StepMemoryPool:
    """A stage's pool of step memory, with CUDA graphs on a GPU."""
    return StepMemoryPool(DEFAULT_STEP_MEMORY_BYTES, cuda_capture() if device.type == "cuda" else None)


class RequestSteps:
    """A prepared request on latents by the denoiser's keyword; close() returns its memory to the pool."""

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
        """The prediction at a step of a denoiser with one latent part."""
        return self.predict_parts({HIDDEN_STATES: hidden_states}, step)[HIDDEN_STATES]

    def predict_parts(self, latents: Mapping[str, Tensor], step: int) -> Predictions:
        """The predictions at a step, by the denoiser's keyword of each latent part."""
        return self._branch.predict(latents, step)

    @property
    def reused(self) -> int:
        """Predictions that took most blocks' work from earlier steps."""
        return self._branch.reused

    def close(self) -> None:
        """Return the memory."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
