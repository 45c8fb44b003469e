"""FLUX.2 klein: a language model as text encoder, the FLUX.2 DiT, a 32-channel image VAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from models.composition import MEDIA_DECODING, StandardImagePipeline, StandardPipeline
from models.registry import Registry

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from common.pipeline import ComposedPipeline

_MODULES = ("text_encoder", "tokenizer", "transformer", "scheduler", "vae")


class Flux2KleinPipeline(StandardPipeline):
    """Diffusers' Flux2KleinPipeline, distilled or not, without images."""

    pipeline_name = "Flux2KleinPipeline"
    relatives = ("Flux2",)
    _required_config_modules = _MODULES

    @classmethod
    def variants(cls, checkpoint: Checkpoint) -> Mapping[str, type[ComposedPipeline]]:
        """Without and with reference images."""
        del checkpoint
        return {"text": Flux2KleinPipeline, "image": Flux2KleinImagePipeline}

    def create_pipeline_stages(self) -> None:
        """Text to image with one encoder."""
        self.add_standard_t2i_stages()


class Flux2KleinImagePipeline(StandardImagePipeline):
    """Diffusers' Flux2KleinPipeline with reference images."""

    pipeline_name = "Flux2KleinPipeline"
    _required_config_modules = _MODULES

    def create_pipeline_stages(self) -> None:
        """Text and images to image: the denoiser alone gets the images, as latents."""
        self.add_standard_ti2v_stages(image_encoder=None, decoding=MEDIA_DECODING)


def register_configs(registry: Registry) -> None:
    """Register the family's configs."""
    registry.register_configs(
        Flux2KleinPipeline.pipeline_name,
        variant="text",
        sampling_params="configs.sample.flux2_klein:Flux2KleinSamplingParams",
        pipeline_config="configs.pipeline_configs.flux2_klein:Flux2KleinPipelineConfig",
    )
    registry.register_configs(
        Flux2KleinPipeline.pipeline_name,
        variant="image",
        sampling_params="configs.sample.flux2_klein:Flux2KleinImageSamplingParams",
        pipeline_config="configs.pipeline_configs.flux2_klein:Flux2KleinImagePipelineConfig",
    )


EntryClass = Flux2KleinPipeline
