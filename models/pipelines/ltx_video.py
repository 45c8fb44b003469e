"""LTX-Video: T5, a DiT over packed video latents, a video VAE with an optional denoising decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from models.composition import GENERATOR_DENOISING, NOISY_VIDEO_DECODING, StandardImagePipeline, StandardPipeline
from models.registry import Registry

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from common.pipeline import ComposedPipeline

MODULES = ("text_encoder", "tokenizer", "transformer", "scheduler", "vae")
"""Modules required by both pipelines."""


class LTXPipeline(StandardPipeline):
    """Diffusers' LTXPipeline: text to video."""

    pipeline_name = "LTXPipeline"
    _required_config_modules = MODULES

    @classmethod
    def variants(cls, checkpoint: Checkpoint) -> Mapping[str, type[ComposedPipeline]]:
        """Both variants, regardless of the pipeline class in the checkpoint."""
        del checkpoint
        return ltx_video_variants()

    def create_pipeline_stages(self) -> None:
        """Text to video."""
        self.add_standard_t2i_stages(denoising=GENERATOR_DENOISING, decoding=NOISY_VIDEO_DECODING)


class LTXImagePipeline(StandardImagePipeline):
    """Diffusers' LTXImageToVideoPipeline for an LTXPipeline checkpoint: text and image to video."""

    pipeline_name = "LTXPipeline"
    _required_config_modules = MODULES

    def create_pipeline_stages(self) -> None:
        """Text and image to video; the image's latents are sampled with the request's seed."""
        self.add_standard_ti2v_stages(
            image_encoder=None,
            denoising=GENERATOR_DENOISING,
            decoding=NOISY_VIDEO_DECODING,
            image_inputs=("sampling",),
        )


def ltx_video_variants() -> dict[str, type[ComposedPipeline]]:
    """The variants of LTX-Video."""
    return {"text": LTXPipeline, "image": LTXImagePipeline}


def register_ltx_video_configs(registry: Registry, pipeline_name: str) -> None:
    """Register the configs of both variants for a `_class_name`."""
    registry.register_configs(
        pipeline_name,
        variant="text",
        sampling_params="configs.sample.ltx_video:LTXVideoSamplingParams",
        pipeline_config="configs.pipeline_configs.ltx_video:LTXVideoPipelineConfig",
    )
    registry.register_configs(
        pipeline_name,
        variant="image",
        sampling_params="configs.sample.ltx_video:LTXVideoImageToVideoSamplingParams",
        pipeline_config="configs.pipeline_configs.ltx_video:LTXVideoImageToVideoPipelineConfig",
    )


def register_configs(registry: Registry) -> None:
    """Register the family's configs."""
    register_ltx_video_configs(registry, LTXPipeline.pipeline_name)


EntryClass = LTXPipeline
