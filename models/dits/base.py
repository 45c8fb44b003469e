"""The interface of all diffusion transformers: work of a request is separate from the work of every step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.layers.step_cache import CacheUse

Predictions = Mapping[str, Tensor]
"""A prediction for each latents argument of predict(), under the argument's name."""


@dataclass(frozen=True)
class MemorySpec:
    """A tensor that predict() reads and updates in place, such as a KV cache: at a fixed address, zeros at first."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def byte_size(self) -> int:
        """Size in bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Prepared:
    """Inputs of a request's steps besides the latents.

    `steps` are tensors (steps, ...), with a row for each step, `constants` the same for all steps; both are keywords of
    predict(), and so is `memory`, which the caller allocates.
    """

    steps: Mapping[str, Tensor]
    constants: Mapping[str, Tensor]
    memory: Mapping[str, MemorySpec] = field(default_factory=dict)

    def row(self, step: int) -> dict[str, Tensor]:
        """The tensors of one step."""
        return {name: rows[step] for name, rows in self.steps.items()}


class DiffusionTransformer(nn.Module, ABC):
    """Predicts from latents, a timestep and conditioning; forward() takes the keywords of Diffusers' model."""

    block_linears: tuple[str, ...]
    """The large linear layers, of the blocks' attention and feed-forwards, as patterns of their paths.

    The loader sets them.
    """

    @abstractmethod
    def prepare(self, timesteps: Tensor, **conditioning: Any) -> Prepared:
        """Compute what does not depend on the latents, for timesteps (steps, B) and forward's other keywords.

        A model whose token segments have timesteps of their own takes (steps, B, segments).
        Embedding every step's timestep at once reads the weights for it once a request, instead of once a step.
        """

    @abstractmethod
    def predict(self, *, use: CacheUse | None = None, **inputs: Any) -> Predictions:
        """Predict for latents, with a row of Prepared.steps, Prepared.constants and the memory.

        A function of its tensors that never reads their values on the host, so that a CUDA graph can capture it. `use`
        says how a step cache is used, if there is one. Other keywords than those of latents, rows, constants and memory
        are the static flags of a branch.
        """

    @abstractmethod
    def residual_elements(self, latents: Mapping[str, Tensor], constants: Mapping[str, Tensor]) -> int:
        """An upper bound of the elements in the residual stream (B, S, D) of a prediction for these latents."""

    def cached_tensors(self, latents: Mapping[str, Tensor]) -> object:
        """Tensors that predict() reads from a cache of the module for latents of these shapes, such as rotations.

        A captured CUDA graph reads them at fixed addresses, so that the owner of the graph has to keep them.
        """
        del latents
        return None
