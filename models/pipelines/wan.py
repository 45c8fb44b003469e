"""Wan 2.1 T2V, Wan 2.2 TI2V and T2V A14B: UMT5, a DiT over video latents, UniPC, a causal video VAE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from models.composition import TRANSFORMER, VIDEO_DECODING, StandardImagePipeline, StandardPipeline
from models.registry import Registry

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from common.pipeline import ComposedPipeline

_MODULES = ("text_encoder", "tokenizer", "transformer", "scheduler", "vae")
EXPERTS = "experts"
"""The only variant of checkpoints with two experts."""
TWO_EXPERTS = {TRANSFORMER: "transformer", "transformer_2": "transformer_2"}
"""Module names of the two experts, by role."""


class WanPipeline(StandardPipeline):
    """Diffusers' WanPipeline: text to video; with a Wan 2.2 TI2V checkpoint also image to video."""

    pipeline_name = "WanPipeline"
    _required_config_modules = _MODULES

    @classmethod
    def variants(cls, checkpoint: Checkpoint) -> Mapping[str, type[ComposedPipeline]]:
        """TI2V variants for `expand_timesteps`, two experts for `boundary_ratio`, otherwise this pipeline."""
        if checkpoint.index.get("expand_timesteps"):
            return ti2v_variants()
        return {"": cls} if checkpoint.index.get("boundary_ratio") is None else {EXPERTS: WanExpertsPipeline}

    def create_pipeline_stages(self) -> None:
        """Text to video with one encoder."""
        self.add_standard_t2i_stages(decoding=VIDEO_DECODING)


class WanExpertsPipeline(StandardPipeline):
    """Diffusers' WanPipeline with `boundary_ratio`: Wan 2.2 T2V A14B."""

    pipeline_name = "WanPipeline"
    _required_config_modules = (*_MODULES, "transformer_2")

    def create_pipeline_stages(self) -> None:
        """Text to video, with one transformer for high and one for low noise levels."""
        self.add_standard_t2i_stages(decoding=VIDEO_DECODING, transformers=TWO_EXPERTS)


class WanTI2VImagePipeline(StandardImagePipeline):
    """Diffusers' WanImageToVideoPipeline with `expand_timesteps`; there is no vision encoder."""

    pipeline_name = "WanPipeline"
    _required_config_modules = _MODULES

    def create_pipeline_stages(self) -> None:
        """Text and image to video."""
        self.add_standard_ti2v_stages(image_encoder=None)


def ti2v_variants() -> dict[str, type[ComposedPipeline]]:
    """The variants of Wan 2.2 TI2V."""
    return {"text": WanPipeline, "image": WanTI2VImagePipeline}


def register_ti2v_configs(registry: Registry, pipeline_name: str) -> None:
    """Register the configs of both variants of Wan 2.2 TI2V for a `_class_name`."""
    registry.register_configs(
        pipeline_name,
        variant="text",
        sampling_params="configs.sample.wan_ti2v:WanTI2VSamplingParams",
        pipeline_config="configs.pipeline_configs.wan_ti2v:WanTI2VPipelineConfig",
    )
    registry.register_configs(
        pipeline_name,
        variant="image",
        sampling_params="configs.sample.wan_ti2v:WanTI2VImageSamplingParams",
        pipeline_config="configs.pipeline_configs.wan_ti2v:WanTI2VImagePipelineConfig",
    )


def register_configs(registry: Registry) -> None:
    """Register the family's configs."""
    registry.register_configs(
        WanPipeline.pipeline_name,
        sampling_params="configs.sample.wan:WanSamplingParams",
        pipeline_config="configs.pipeline_configs.wan:WanPipelineConfig",
    )
    registry.register_configs(
        WanPipeline.pipeline_name,
        variant=EXPERTS,
        sampling_params="configs.sample.wan_a14b:WanA14BSamplingParams",
        pipeline_config="configs.pipeline_configs.wan_a14b:WanA14BPipelineConfig",
    )
    register_ti2v_configs(registry, WanPipeline.pipeline_name)


EntryClass = WanPipeline
