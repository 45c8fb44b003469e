"""Wan: UMT5, a flow-matching DiT over video latents, UniPC, a causal video VAE. Text to video, and Wan 2.2 TI2V."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from common.pipeline import ComposedPipeline
from models.composition import StandardImagePipeline, StandardPipeline
from models.registry import Registry

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint

_MODULES = ("text_encoder", "tokenizer", "transformer", "scheduler", "vae")


class WanPipeline(StandardPipeline):
    """Diffusers' WanPipeline, text to video: Wan 2.1 T2V in all sizes, their fine-tunes, and Wan 2.2 TI2V."""

    pipeline_name = "WanPipeline"
    _required_config_modules = _MODULES

    @classmethod
    def variants(cls, checkpoint: Checkpoint) -> Mapping[str, type[ComposedPipeline]]:
        """Wan 2.2 TI2V, whose timesteps expand to tokens, has two: `text` and `image`."""
        if checkpoint.index.get("expand_timesteps"):
            return {"text": cls, "image": WanTI2VImagePipeline}
        return super().variants(checkpoint)

    def create_pipeline_stages(self) -> None:
        """Text to video with one encoder."""
        self.add_standard_t2i_stages()


class WanTI2VImagePipeline(StandardImagePipeline):
    """Diffusers' WanImageToVideoPipeline over a directory of Wan 2.2 TI2V: latents of the image, no vision encoder."""

    pipeline_name = "WanPipeline"
    _required_config_modules = _MODULES

    def create_pipeline_stages(self) -> None:
        """Text and image to video."""
        self.add_standard_ti2v_stages(image_modules=())


def register_configs(registry: Registry) -> None:
    """Name the configs of Wan 2.1, and of both variants of Wan 2.2 TI2V."""
    name = WanPipeline.pipeline_name
    registry.register_configs(
        name,
        sampling_params="configs.sample.wan:WanSamplingParams",
        pipeline_config="configs.pipeline_configs.wan:WanPipelineConfig",
    )
    registry.register_configs(
        name,
        variant="text",
        sampling_params="configs.sample.wan:WanSamplingParams",
        pipeline_config="configs.pipeline_configs.wan:WanTI2VPipelineConfig",
    )
    registry.register_configs(
        name,
        variant="image",
        sampling_params="configs.sample.wan:WanImageToVideoSamplingParams",
        pipeline_config="configs.pipeline_configs.wan:WanTI2VImagePipelineConfig",
    )


EntryClass = WanPipeline
