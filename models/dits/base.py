"""What all diffusion transformers share: work that a request needs once is apart from work that every step needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from models.layers.step_cache import CacheUse


@dataclass(frozen=True)
class Prepared:
    """What a request's steps need besides the latents.

    `steps` (steps, B, ...) has what depends on the timestep, a row a step; `constants` are predict()'s other keywords.
    """

    steps: Tensor
    constants: Mapping[str, Tensor]


class DiffusionTransformer(nn.Module, ABC):
    """Predicts from latents, a timestep and conditioning; forward() takes the keywords of Diffusers' model."""

    block_linears: ClassVar[tuple[str, ...]]
    """The large linear layers, of the blocks' attention and feed-forwards, as patterns of their paths."""

    @abstractmethod
    def prepare(self, timesteps: Tensor, **conditioning: Any) -> Prepared:
        """All that does not depend on the latents, for timesteps (steps, B) and forward's other keywords.

        Embedding every step's timestep at once reads the weights for it once a request, instead of once a step.
        """

    @abstractmethod
    def predict(
        self, hidden_states: Tensor, modulation: Tensor, *, use: CacheUse | None = None, **constants: Any
    ) -> Tensor:
        """The prediction for latents, with a row of Prepared.steps and Prepared.constants.

        A function of its tensors, without a look at their values: a CUDA graph can hold it. `use` says what to
        do with a step cache, where there is one.
        """
