"""Wan 2.1: UMT5, a flow-matching DiT over video latents, UniPC, a causal video VAE. Text to video."""

from __future__ import annotations

from models.composition import StandardPipeline
from models.registry import Registry


class WanPipeline(StandardPipeline):
    """Diffusers' WanPipeline, text to video: Wan 2.1 T2V in all sizes, and their fine-tunes."""

    pipeline_name = "WanPipeline"
    _required_config_modules = ("text_encoder", "tokenizer", "transformer", "scheduler", "vae")

    def create_pipeline_stages(self) -> None:
        """Text to video with one encoder."""
        self.add_standard_t2i_stages()


def register_configs(registry: Registry) -> None:
    """Name the family's configs."""
    registry.register_configs(
        WanPipeline.pipeline_name,
        sampling_params="configs.sample.wan:WanSamplingParams",
        pipeline_config="configs.pipeline_configs.wan:WanPipelineConfig",
    )


EntryClass = WanPipeline
