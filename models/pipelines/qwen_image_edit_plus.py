"""Qwen-Image-Edit-Plus (2509, 2511): Qwen-Image-Edit with several images."""

from __future__ import annotations

from models.pipelines.qwen_image_edit import QwenImageEditPipeline
from models.registry import Registry


class QwenImageEditPlusPipeline(QwenImageEditPipeline):
    """Diffusers' QwenImageEditPlusPipeline: images and an instruction to an image."""

    pipeline_name = "QwenImageEditPlusPipeline"


def register_configs(registry: Registry) -> None:
    """Register the family's configs."""
    registry.register_configs(
        QwenImageEditPlusPipeline.pipeline_name,
        sampling_params="configs.sample.qwen_image:QwenImageEditPlusSamplingParams",
        pipeline_config="configs.pipeline_configs.qwen_image_edit_plus:QwenImageEditPlusPipelineConfig",
    )


EntryClass = QwenImageEditPlusPipeline
