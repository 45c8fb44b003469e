"""Few-step Wan, distilled by DMD: FastWan and TurboWan."""

from __future__ import annotations

from models.composition import DMD_DENOISING, VIDEO_DECODING, StandardPipeline
from models.registry import Registry


class WanDMDPipeline(StandardPipeline):
    """FastVideo's WanDMDPipeline: text to video. The checkpoint's scheduler is not used."""

    pipeline_name = "WanDMDPipeline"
    _required_config_modules = ("text_encoder", "tokenizer", "transformer", "vae")

    def create_pipeline_stages(self) -> None:
        """Text to video with one encoder."""
        self.add_standard_t2i_stages(scheduler=None, denoising=DMD_DENOISING, decoding=VIDEO_DECODING)


def register_configs(registry: Registry) -> None:
    """Register the family's configs."""
    registry.register_configs(
        WanDMDPipeline.pipeline_name,
        sampling_params="configs.sample.wan_dmd:WanDMDSamplingParams",
        pipeline_config="configs.pipeline_configs.wan_dmd:WanDMDPipelineConfig",
    )


EntryClass = WanDMDPipeline
