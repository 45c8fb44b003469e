"""Wan image to video: Wan 2.1 I2V, Wan 2.1 FLF2V and Wan 2.2 I2V A14B (two experts).

Wan 2.1 is conditioned on CLIP tokens of the image, and on its latents, which are concatenated to the noise as channels.
Wan 2.2 I2V A14B has two experts and no CLIP encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from models.composition import StandardImagePipeline
from models.pipelines.wan import EXPERTS, TWO_EXPERTS, register_ti2v_configs, ti2v_variants
from models.registry import Registry

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from common.pipeline import ComposedPipeline


class WanImageToVideoPipeline(StandardImagePipeline):
    """Diffusers' WanImageToVideoPipeline: Wan 2.1 I2V, and FLF2V from a first and a last frame."""

    pipeline_name = "WanImageToVideoPipeline"
    relatives = ("WanImage2Video", "Wan22Image2Video", "WanAnimate")
    _required_config_modules = (
        "text_encoder",
        "tokenizer",
        "image_encoder",
        "image_processor",
        "transformer",
        "scheduler",
        "vae",
    )

    @classmethod
    def variants(cls, checkpoint: Checkpoint) -> Mapping[str, type[ComposedPipeline]]:
        """TI2V variants for `expand_timesteps`, two experts for `boundary_ratio`, otherwise this pipeline."""
        if checkpoint.index.get("expand_timesteps"):
            return ti2v_variants()
        return {"": cls} if checkpoint.index.get("boundary_ratio") is None else {EXPERTS: WanExpertsImagePipeline}

    def create_pipeline_stages(self) -> None:
        """Text and image to video."""
        self.add_standard_ti2v_stages()


class WanExpertsImagePipeline(StandardImagePipeline):
    """Diffusers' WanImageToVideoPipeline with `boundary_ratio`: Wan 2.2 I2V A14B."""

    pipeline_name = "WanImageToVideoPipeline"
    _required_config_modules = ("text_encoder", "tokenizer", "transformer", "transformer_2", "scheduler", "vae")

    def create_pipeline_stages(self) -> None:
        """Text and image to video; the experts read the image only as latents."""
        self.add_standard_ti2v_stages(image_encoder=None, transformers=TWO_EXPERTS)


def register_configs(registry: Registry) -> None:
    """Register the family's configs."""
    registry.register_configs(
        WanImageToVideoPipeline.pipeline_name,
        sampling_params="configs.sample.wan:WanImageToVideoSamplingParams",
        pipeline_config="configs.pipeline_configs.wan:WanImageToVideoPipelineConfig",
    )
    registry.register_configs(
        WanImageToVideoPipeline.pipeline_name,
        variant=EXPERTS,
        sampling_params="configs.sample.wan_a14b:WanA14BImageSamplingParams",
        pipeline_config="configs.pipeline_configs.wan_a14b:WanA14BImagePipelineConfig",
    )
    register_ti2v_configs(registry, WanImageToVideoPipeline.pipeline_name)


EntryClass = WanImageToVideoPipeline
