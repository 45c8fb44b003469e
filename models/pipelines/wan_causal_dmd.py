"""Causal few-step Wan: Self Forcing, whose videos stream block by block."""

from __future__ import annotations

from models.composition import BLOCK_DECODING, CAUSAL_DMD_DENOISING, StandardPipeline
from models.registry import Registry


class WanCausalDMDPipeline(StandardPipeline):
    """FastVideo's WanCausalDMDPipeline: text to video. The checkpoint's scheduler is not used."""

    pipeline_name = "WanCausalDMDPipeline"
    _required_config_modules = ("text_encoder", "tokenizer", "transformer", "vae")

    def create_pipeline_stages(self) -> None:
        """Text to video with one encoder; denoising and decoding overlap."""
        self.add_standard_t2i_stages(scheduler=None, denoising=CAUSAL_DMD_DENOISING, decoding=BLOCK_DECODING)


def register_configs(registry: Registry) -> None:
    """Register the family's configs."""
    registry.register_configs(
        WanCausalDMDPipeline.pipeline_name,
        sampling_params="configs.sample.wan_dmd:WanCausalDMDSamplingParams",
        pipeline_config="configs.pipeline_configs.wan_dmd:WanCausalDMDPipelineConfig",
    )


EntryClass = WanCausalDMDPipeline
