"""Z-Image: a language model as text encoder, a single-stream DiT, a 16-channel image VAE."""

from __future__ import annotations

from models.composition import StandardPipeline
from models.registry import Registry


class ZImagePipeline(StandardPipeline):
    """Diffusers' ZImagePipeline, text to image: Z-Image, Z-Image-Turbo and their fine-tunes."""

    pipeline_name = "ZImagePipeline"
    _required_config_modules = ("text_encoder", "tokenizer", "transformer", "scheduler", "vae")

    def create_pipeline_stages(self) -> None:
        """Text to image with one encoder."""
        self.add_standard_t2i_stages()


def register_configs(registry: Registry) -> None:
    """Register the family's configs."""
    registry.register_configs(
        ZImagePipeline.pipeline_name,
        sampling_params="configs.sample.z_image:ZImageSamplingParams",
        pipeline_config="configs.pipeline_configs.z_image:ZImagePipelineConfig",
    )


EntryClass = ZImagePipeline
