"""Qwen-Image: a language model as text encoder, a packed flow-matching DiT, a video VAE for images."""

from __future__ import annotations

from models.composition import StandardPipeline
from models.registry import Registry


class QwenImagePipeline(StandardPipeline):
    """Diffusers' QwenImagePipeline, text to image."""

    pipeline_name = "QwenImagePipeline"
    _required_config_modules = ("text_encoder", "tokenizer", "transformer", "scheduler", "vae")

    def create_pipeline_stages(self) -> None:
        """Text to image with one encoder."""
        self.add_standard_t2i_stages()


def register_configs(registry: Registry) -> None:
    """Register the family's configs."""
    registry.register_configs(
        QwenImagePipeline.pipeline_name,
        sampling_params="configs.sample.qwen_image:QwenImageSamplingParams",
        pipeline_config="configs.pipeline_configs.qwen_image:QwenImagePipelineConfig",
    )


EntryClass = QwenImagePipeline
