"""Qwen-Image-Layered: decomposes an image into transparent layers, guided by a prompt or a caption."""

from __future__ import annotations

from models.composition import StandardImagePipeline
from models.registry import Registry


class QwenImageLayeredPipeline(StandardImagePipeline):
    """Diffusers' QwenImageLayeredPipeline, in the hybrid style."""

    pipeline_name = "QwenImageLayeredPipeline"
    _required_config_modules = ("text_encoder", "tokenizer", "processor", "transformer", "scheduler", "vae")

    def create_pipeline_stages(self) -> None:
        """A model-specific stage, then denoising and decoding."""
        self.add_hybrid_stages(
            "models.stages.model_specific_stages.qwen_image_layered:QwenImageLayeredBeforeDenoisingStage",
            modules=("text_encoder", "tokenizer", "processor", "vae"),
            inputs=("image_inputs",),
            denoising_inputs=("image_latents",),
        )


def register_configs(registry: Registry) -> None:
    """Register the family's configs."""
    registry.register_configs(
        QwenImageLayeredPipeline.pipeline_name,
        sampling_params="configs.sample.qwen_image_layered:QwenImageLayeredSamplingParams",
        pipeline_config="configs.pipeline_configs.qwen_image_layered:QwenImageLayeredPipelineConfig",
    )


EntryClass = QwenImageLayeredPipeline
