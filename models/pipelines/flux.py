"""FLUX.1: CLIP (pooled) and T5 as text encoders, a packed flow-matching DiT, a 16-channel image VAE."""

from __future__ import annotations

from models.composition import StandardPipeline
from models.registry import Registry


class FluxPipeline(StandardPipeline):
    """Diffusers' FluxPipeline, text to image: FLUX.1-dev, FLUX.1-schnell and their fine-tunes."""

    pipeline_name = "FluxPipeline"
    _required_config_modules = (
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "transformer",
        "scheduler",
        "vae",
    )

    def create_pipeline_stages(self) -> None:
        """Text to image with both encoders."""
        self.add_standard_t2i_stages(text_modules=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))


def register_configs(registry: Registry) -> None:
    """Register the family's configs."""
    registry.register_configs(
        FluxPipeline.pipeline_name,
        sampling_params="configs.sample.flux:FluxSamplingParams",
        pipeline_config="configs.pipeline_configs.flux:FluxPipelineConfig",
    )


EntryClass = FluxPipeline
