"""Wan 2.2 A14B: one transformer for high noise levels and one for low noise levels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar, Self

from common.errors import CheckpointError
from configs.models.dits.wan import WanTransformerConfig
from configs.models.fields import ConfigFields
from configs.pipeline_configs.base import TRANSFORMER, Parts, Step
from configs.pipeline_configs.guidance import classifier_free
from configs.pipeline_configs.wan import WanImageToVideoPipelineConfig, WanPipelineConfig

if TYPE_CHECKING:
    from common.artifacts import Sampling
    from common.checkpoint import Checkpoint

TRANSFORMER_2 = "transformer_2"


@dataclass(frozen=True, kw_only=True)
class WanA14BPipelineConfig(WanPipelineConfig):
    """WanPipeline's callbacks with `boundary_ratio`: timesteps below `boundary` use transformer_2.

    Both experts have the same architecture.
    """

    title: ClassVar[str] = "Wan 2.2 A14B (T2V, I2V)"
    deviations: ClassVar[str] = "Both experts are required; Diffusers can also run a single one."

    transformers: ClassVar[tuple[str, ...]] = (TRANSFORMER, TRANSFORMER_2)

    boundary: float = 0.0

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Parse the modules' config.json, including both experts, and the boundary.

        Raises CheckpointError for experts with different architectures or with a vision encoder.
        """
        first, second = (
            WanTransformerConfig.from_dict(name, checkpoint.module_config(name)) for name in cls.transformers
        )
        for name in (item.name for item in fields(second)):
            own, expected = vars(second)[name], vars(first)[name]
            if own != expected:
                message = f"transformer_2/config.json: {name}: {own} is not {expected}"
                raise CheckpointError(f"{message}, transformer's value; both experts must have one architecture")
        if first.image_dim is not None:
            message = f"transformer/config.json: image_dim: {first.image_dim} is not null"
            raise CheckpointError(f"{message}; Wan 2.2 A14B reads images only as latents")
        config = super().from_checkpoint(checkpoint)
        return replace(config, boundary=_boundary_ratio(checkpoint) * _train_timesteps(checkpoint))

    def expert(self, step: Step) -> str:
        """`transformer` at or above the boundary, otherwise `transformer_2`."""
        return TRANSFORMER if step.timestep >= self.boundary else TRANSFORMER_2

    def guide(self, predictions: Mapping[str, Parts], latents: Parts, step: Step, sampling: Sampling) -> Parts:
        """Classifier-free guidance with the scale of the step's expert."""
        del latents
        scale = sampling.guidance_scale or 0.0
        if self.expert(step) == TRANSFORMER_2:
            own = sampling.params.get("guidance_scale_2", scale)
            assert isinstance(own, float), "WanA14BSamplingParams validates it"
            scale = own
        return {"video": classifier_free(predictions, "video", scale)}


@dataclass(frozen=True, kw_only=True)
class WanA14BImagePipelineConfig(WanA14BPipelineConfig, WanImageToVideoPipelineConfig):
    """WanImageToVideoPipeline's callbacks with `boundary_ratio`; there is no vision encoder."""


def _boundary_ratio(checkpoint: Checkpoint) -> float:
    """Parse boundary_ratio. Raises CheckpointError unless it is a number from 0 to 1."""
    ratio = checkpoint.index.get("boundary_ratio")
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
        raise CheckpointError(f"model_index.json: boundary_ratio: {ratio!r} is not a number from 0 to 1")
    return float(ratio)


def _train_timesteps(checkpoint: Checkpoint) -> int:
    fields_of_scheduler = ConfigFields("scheduler", checkpoint.config_of("scheduler"))
    return fields_of_scheduler.integer("num_train_timesteps", 1000)
