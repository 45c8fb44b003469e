"""Wan 2.1, image to video: the same with CLIP's view of the picture, and its latents beside the noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from models.composition import StandardImagePipeline
from models.pipelines.wan import register_ti2v_configs, ti2v_variants
from models.registry import Registry

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from common.pipeline import ComposedPipeline


class WanImageToVideoPipeline(StandardImagePipeline):
    """Diffusers' WanImageToVideoPipeline: Wan 2.1 I2V, and FLF2V from a first and a last frame."""

    pipeline_name = "WanImageToVideoPipeline"
    _required_config_modules = (
        "text_encoder",
        "tokenizer",
        "image_encoder",
        "image_processor",
        "transformer",
        "scheduler",
        "vae",
    )

    @classmethod
    def variants(cls, checkpoint: Checkpoint) -> Mapping[str, type[ComposedPipeline]]:
        """Those of Wan 2.2 TI2V for a checkpoint with `expand_timesteps`, else this pipeline alone."""
        return ti2v_variants() if checkpoint.index.get("expand_timesteps") else {"": cls}

    def create_pipeline_stages(self) -> None:
        """Text and image to video."""
        self.add_standard_ti2v_stages()


def register_configs(registry: Registry) -> None:
    """Name the family's configs."""
    registry.register_configs(
        WanImageToVideoPipeline.pipeline_name,
        sampling_params="configs.sample.wan:WanImageToVideoSamplingParams",
        pipeline_config="configs.pipeline_configs.wan:WanImageToVideoPipelineConfig",
    )
    register_ti2v_configs(registry, WanImageToVideoPipeline.pipeline_name)


EntryClass = WanImageToVideoPipeline
