"""FLUX.2 klein: Qwen3 as text encoder, the FLUX.2 DiT, a 32-channel image VAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from models.pipelines.flux2 import Flux2ImagePipeline, Flux2Pipeline
from models.registry import Registry

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from common.pipeline import ComposedPipeline


class Flux2KleinPipeline(Flux2Pipeline):
    """Diffusers' Flux2KleinPipeline, distilled or not, without images."""

    pipeline_name = "Flux2KleinPipeline"

    @classmethod
    def variants(cls, checkpoint: Checkpoint) -> Mapping[str, type[ComposedPipeline]]:
        """Variants: "text" without reference images, "image" with reference images."""
        del checkpoint
        return {"text": cls, "image": Flux2KleinImagePipeline}


class Flux2KleinImagePipeline(Flux2ImagePipeline):
    """Diffusers' Flux2KleinPipeline with reference images."""

    pipeline_name = "Flux2KleinPipeline"


def register_configs(registry: Registry) -> None:
    """Register the family's configs."""
    registry.register_configs(
        Flux2KleinPipeline.pipeline_name,
        variant="text",
        sampling_params="configs.sample.flux2_klein:Flux2KleinSamplingParams",
        pipeline_config="configs.pipeline_configs.flux2_klein:Flux2KleinPipelineConfig",
    )
    registry.register_configs(
        Flux2KleinPipeline.pipeline_name,
        variant="image",
        sampling_params="configs.sample.flux2_klein:Flux2KleinImageSamplingParams",
        pipeline_config="configs.pipeline_configs.flux2_klein:Flux2KleinImagePipelineConfig",
    )


EntryClass = Flux2KleinPipeline
