"""Wan 2.1, image to video: the same with CLIP's view of the picture, and its latents beside the noise."""

from __future__ import annotations

from models.composition import StandardImagePipeline
from models.registry import Registry


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


EntryClass = WanImageToVideoPipeline
