"""HunyuanVideo: Llama and CLIP as text encoders, a flow-matching DiT over video latents, a video VAE."""

from __future__ import annotations

from models.composition import VIDEO_DECODING, StandardPipeline
from models.registry import Registry

_TEXT_MODULES = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")


class HunyuanVideoPipeline(StandardPipeline):
    """Diffusers' HunyuanVideoPipeline, text to video."""

    pipeline_name = "HunyuanVideoPipeline"
    _required_config_modules = (*_TEXT_MODULES, "transformer", "scheduler", "vae")

    def create_pipeline_stages(self) -> None:
        """Text to video with both encoders."""
        self.add_standard_t2i_stages(text_modules=_TEXT_MODULES, decoding=VIDEO_DECODING)


def register_configs(registry: Registry) -> None:
    """Register the family's configs."""
    registry.register_configs(
        HunyuanVideoPipeline.pipeline_name,
        sampling_params="configs.sample.hunyuan_video:HunyuanVideoSamplingParams",
        pipeline_config="configs.pipeline_configs.hunyuan_video:HunyuanVideoPipelineConfig",
    )


EntryClass = HunyuanVideoPipeline
