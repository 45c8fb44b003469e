"""FLUX.2 dev: Mistral Small 3 as text encoder, a DiT with embedded guidance, a 32-channel image VAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from models.composition import MEDIA_DECODING, StandardImagePipeline, StandardPipeline
from models.registry import Registry

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from common.pipeline import ComposedPipeline

MODULES = ("text_encoder", "tokenizer", "transformer", "scheduler", "vae")
"""Modules required by dev and klein."""


class Flux2Pipeline(StandardPipeline):
    """Diffusers' Flux2Pipeline without images."""

    pipeline_name = "Flux2Pipeline"
    _required_config_modules = MODULES

    @classmethod
    def variants(cls, checkpoint: Checkpoint) -> Mapping[str, type[ComposedPipeline]]:
        """Variants: "text" without reference images, "image" with reference images."""
        del checkpoint
        return {"text": cls, "image": Flux2ImagePipeline}

    def create_pipeline_stages(self) -> None:
        """Text to image with one encoder."""
        self.add_standard_t2i_stages()


class Flux2ImagePipeline(StandardImagePipeline):
    """Diffusers' Flux2Pipeline with reference images."""

    pipeline_name = "Flux2Pipeline"
    _required_config_modules = MODULES

    def create_pipeline_stages(self) -> None:
        """Text and images to image; only the denoiser reads the images, as latents."""
        self.add_standard_ti2v_stages(image_encoder=None, decoding=MEDIA_DECODING)


def register_configs(registry: Registry) -> None:
    """Register the family's configs."""
    registry.register_configs(
        Flux2Pipeline.pipeline_name,
        variant="text",
        sampling_params="configs.sample.flux2:Flux2SamplingParams",
        pipeline_config="configs.pipeline_configs.flux2_dev:Flux2PipelineConfig",
    )
    registry.register_configs(
        Flux2Pipeline.pipeline_name,
        variant="image",
        sampling_params="configs.sample.flux2:Flux2ImageSamplingParams",
        pipeline_config="configs.pipeline_configs.flux2_dev:Flux2ImagePipelineConfig",
    )


EntryClass = Flux2Pipeline
