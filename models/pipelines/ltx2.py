"""LTX-2: Gemma 3 with connectors, a DiT over video and audio latents, two VAEs and a vocoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from models.composition import MEDIA_DECODING, StandardImagePipeline, StandardPipeline
from models.registry import Registry

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint
    from common.pipeline import ComposedPipeline

_TEXT_MODULES = ("text_encoder", "tokenizer", "connectors")
_DECODERS = {"vae": "vae", "audio_vae": "audio_vae", "vocoder": "vocoder"}
MODULES = (*_TEXT_MODULES, "transformer", "scheduler", *_DECODERS)
"""Modules required by both pipelines."""


class LTX2Pipeline(StandardPipeline):
    """Diffusers' LTX2Pipeline: text to a video with audio."""

    pipeline_name = "LTX2Pipeline"
    _required_config_modules = MODULES

    @classmethod
    def variants(cls, checkpoint: Checkpoint) -> Mapping[str, type[ComposedPipeline]]:
        """Both variants, regardless of the pipeline class in the checkpoint."""
        del checkpoint
        return ltx2_variants()

    def create_pipeline_stages(self) -> None:
        """Text to video."""
        self.add_standard_t2i_stages(text_modules=_TEXT_MODULES, decoders=_DECODERS)


class LTX2ImagePipeline(StandardImagePipeline):
    """Diffusers' LTX2ImageToVideoPipeline for an LTX2Pipeline checkpoint; the video has audio."""

    pipeline_name = "LTX2Pipeline"
    _required_config_modules = MODULES

    def create_pipeline_stages(self) -> None:
        """Text and image to video; the image is compressed with the request's `image_crf`."""
        self.add_standard_ti2v_stages(
            text_modules=_TEXT_MODULES,
            image_encoder=None,
            decoders=_DECODERS,
            decoding=MEDIA_DECODING,
            image_inputs=("sampling",),
        )


def ltx2_variants() -> dict[str, type[ComposedPipeline]]:
    """The variants of LTX-2."""
    return {"text": LTX2Pipeline, "image": LTX2ImagePipeline}


def register_ltx2_configs(registry: Registry, pipeline_name: str) -> None:
    """Register the configs of both variants for a `_class_name`."""
    registry.register_configs(
        pipeline_name,
        variant="text",
        sampling_params="configs.sample.ltx2:LTX2SamplingParams",
        pipeline_config="configs.pipeline_configs.ltx2:LTX2PipelineConfig",
    )
    registry.register_configs(
        pipeline_name,
        variant="image",
        sampling_params="configs.sample.ltx2:LTX2ImageToVideoSamplingParams",
        pipeline_config="configs.pipeline_configs.ltx2:LTX2ImageToVideoPipelineConfig",
    )


def register_configs(registry: Registry) -> None:
    """Register the family's configs."""
    register_ltx2_configs(registry, LTX2Pipeline.pipeline_name)


EntryClass = LTX2Pipeline
