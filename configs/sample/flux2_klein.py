"""Sampling parameters of FLUX.2 klein, following Diffusers 0.42's Flux2KleinPipeline."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Self

from common.artifacts import ParamValue
from common.checkpoint import Checkpoint
from configs.models.fields import ConfigFields
from configs.sample.base import ParamWarning
from configs.sample.flux2 import Flux2ImageSamplingParams, Flux2SamplingParams


@dataclass(frozen=True, kw_only=True)
class Flux2KleinSamplingParams(Flux2SamplingParams):
    """FLUX.2 klein, distilled or not. guidance_scale above 1 enables classifier-free guidance.

    Distilled models have no guidance. The negative prompt is always empty.
    """

    @classmethod
    def model_defaults(cls, checkpoint: Checkpoint) -> dict[str, ParamValue]:
        """The base class's defaults, and guidance_scale 1 for a distilled model, which has no guidance."""
        guidance: dict[str, ParamValue] = {"guidance_scale": 1.0} if _is_distilled(checkpoint) else {}
        return {**super().model_defaults(checkpoint), **guidance}

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Validate as for FLUX.2 dev, and drop the guidance of a distilled model with a warning."""
        params, warnings = super().round_and_validate(checkpoint, given)
        if params.guidance_scale <= 1 or not _is_distilled(checkpoint):
            return params, warnings
        idle = ParamWarning("guidance_scale", "no effect on this distilled model")
        return replace(params, guidance_scale=1.0), (*warnings, idle)

    @property
    def branches(self) -> int:
        """2 with classifier-free guidance, otherwise 1."""
        return 2 if self.guidance_scale > 1 else 1


@dataclass(frozen=True, kw_only=True)
class Flux2KleinImageSamplingParams(Flux2KleinSamplingParams, Flux2ImageSamplingParams):
    """FLUX.2 klein with reference images."""


def _is_distilled(checkpoint: Checkpoint) -> bool:
    return ConfigFields("model_index", checkpoint.index).flag("is_distilled", False)
