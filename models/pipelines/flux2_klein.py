"""FLUX.2 klein: a language model as text encoder, the FLUX.2 DiT, a 32-channel image VAE."""

from __future__ import annotations

from models.composition import StandardPipeline
from models.registry import Registry


class Flux2KleinPipeline(StandardPipeline):
    """Diffusers' Flux2KleinPipeline, text to image, distilled or not."""

    pipeline_name = "Flux2KleinPipeline"
    relatives = ("Flux2",)
    _required_config_modules = ("text_encoder", "tokenizer", "transformer", "scheduler", "vae")

    def create_pipeline_stages(self) -> None:
        """Text to image with one encoder."""
        self.add_standard_t2i_stages()


def register_configs(registry: Registry) -> None:
    """Register the family's configs."""
    registry.register_configs(
        Flux2KleinPipeline.pipeline_name,
        sampling_params="configs.sample.flux2_klein:Flux2KleinSamplingParams",
        pipeline_config="configs.pipeline_configs.flux2_klein:Flux2KleinPipelineConfig",
    )


EntryClass = Flux2KleinPipeline
