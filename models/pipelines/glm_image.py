"""GLM-Image: a language model for prior tokens, a glyph encoder, a flow-matching DiT, an image VAE."""

from __future__ import annotations

from models.composition import StandardPipeline
from models.registry import Registry


class GlmImagePipeline(StandardPipeline):
    """Diffusers' GlmImagePipeline, text to image, in the hybrid style."""

    pipeline_name = "GlmImagePipeline"
    _required_config_modules = (
        "vision_language_encoder",
        "processor",
        "text_encoder",
        "tokenizer",
        "transformer",
        "scheduler",
        "vae",
    )

    def create_pipeline_stages(self) -> None:
        """A model-specific stage, then denoising and decoding."""
        self.add_hybrid_stages(
            "models.stages.model_specific_stages.glm_image:GlmImageBeforeDenoisingStage",
            modules=("vision_language_encoder", "processor", "text_encoder", "tokenizer"),
        )


def register_configs(registry: Registry) -> None:
    """Register the family's configs."""
    registry.register_configs(
        GlmImagePipeline.pipeline_name,
        sampling_params="configs.sample.glm_image:GlmImageSamplingParams",
        pipeline_config="configs.pipeline_configs.glm_image:GlmImagePipelineConfig",
    )


EntryClass = GlmImagePipeline
