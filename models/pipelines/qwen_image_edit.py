"""Qwen-Image-Edit: Qwen-Image with an input image for the language model and the DiT."""

from __future__ import annotations

from models.composition import StandardImagePipeline
from models.registry import Registry


class QwenImageEditPipeline(StandardImagePipeline):
    """Diffusers' QwenImageEditPipeline: an image and an instruction to an image."""

    pipeline_name = "QwenImageEditPipeline"
    _required_config_modules = ("text_encoder", "tokenizer", "processor", "transformer", "scheduler", "vae")

    def create_pipeline_stages(self) -> None:
        """Text and image to image."""
        self.add_standard_ti2i_stages()


def register_configs(registry: Registry) -> None:
    """Register the family's configs."""
    registry.register_configs(
        QwenImageEditPipeline.pipeline_name,
        sampling_params="configs.sample.qwen_image:QwenImageEditSamplingParams",
        pipeline_config="configs.pipeline_configs.qwen_image_edit:QwenImageEditPipelineConfig",
    )


EntryClass = QwenImageEditPipeline
