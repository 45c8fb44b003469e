"""Wan 2.2 A14B: one transformer for the steps of high noise, and one for those of low noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar, Self

from common.errors import CheckpointError
from configs.models.dits.wan import WanTransformerConfig
from configs.models.fields import ConfigFields
from configs.pipeline_configs.base import NEGATIVE, POSITIVE, TRANSFORMER, Parts, Step
from configs.pipeline_configs.wan import WanImageToVideoPipelineConfig, WanPipelineConfig

if TYPE_CHECKING:
    from common.artifacts import Sampling
    from common.checkpoint import Checkpoint

TRANSFORMER_2 = "transformer_2"


@dataclass(frozen=True, kw_only=True)
class WanA14BPipelineConfig(WanPipelineConfig):
    """WanPipeline's callbacks with `boundary_ratio`: steps whose timestep is below `boundary` take transformer_2.

    Both experts have one architecture.
    """

    title: ClassVar[str] = "Wan 2.2 A14B (T2V, I2V)"
    deviations: ClassVar[str] = "Both experts are required, as each has its steps; Diffusers also runs one alone."

    transformers: ClassVar[tuple[str, ...]] = (TRANSFORMER, TRANSFORMER_2)

    boundary: float = 0.0

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Read both experts and the boundary, too. Raises CheckpointError for experts that differ or read tokens."""
        first, second = (
            WanTransformerConfig.from_dict(name, checkpoint.module_config(name)) for name in cls.transformers
        )
        for name in (item.name for item in fields(second)):
            own, expected = vars(second)[name], vars(first)[name]
            if own != expected:
                message = f"transformer_2/config.json: {name}: {own} is not {expected}"
                raise CheckpointError(f"{message}; both experts must have the architecture of transformer")
        if first.image_dim is not None:
            message = f"transformer/config.json: image_dim: {first.image_dim} is not null"
            raise CheckpointError(f"{message}; Wan 2.2 A14B reads images as latents only")
        config = super().from_checkpoint(checkpoint)
        return replace(config, boundary=_boundary_ratio(checkpoint) * _train_timesteps(checkpoint))

    def expert(self, step: Step) -> str:
        """`transformer` at the boundary and above."""
        return TRANSFORMER if step.timestep >= self.boundary else TRANSFORMER_2

    def guide(self, predictions: Mapping[str, Parts], latents: Parts, step: Step, sampling: Sampling) -> Parts:
        """Classifier-free guidance with the scale of the step's expert."""
        del latents
        scale = sampling.guidance_scale or 0.0
        if self.expert(step) == TRANSFORMER_2:
            own = sampling.params.get("guidance_scale_2", scale)
            assert isinstance(own, float), "SamplingParams checks it"
            scale = own
        positive, negative = predictions[POSITIVE]["video"], predictions[NEGATIVE]["video"]
        return {"video": negative + scale * (positive - negative)}


@dataclass(frozen=True, kw_only=True)
class WanA14BImagePipelineConfig(WanA14BPipelineConfig, WanImageToVideoPipelineConfig):
    """WanImageToVideoPipeline's callbacks with `boundary_ratio`; there is no vision encoder."""


def _boundary_ratio(checkpoint: Checkpoint) -> float:
    """Raises CheckpointError for anything but a number from 0 to 1."""
    ratio = checkpoint.index.get("boundary_ratio")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
        raise CheckpointError(f"model_index.json: boundary_ratio: {ratio!r} is not a number from 0 to 1")
    return float(ratio)


def _train_timesteps(checkpoint: Checkpoint) -> int:
    fields_of_scheduler = ConfigFields("scheduler", checkpoint.config_of("scheduler"))
    return fields_of_scheduler.integer("num_train_timesteps", 1000)
