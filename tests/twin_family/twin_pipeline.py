"""A family with two variants of one checkpoint: text to image, with or without an image as tint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from toy_pipeline import ToyPipeline

from common.pipeline import ComposedPipeline, Cost, StageSpec
from models import contracts
from models.registry import Registry

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint


_TEXT_ENCODER = "twin_stages:TwinTextEncodingStage"


class TwinPipeline(ToyPipeline):
    """The variant without an image; variants() also lists the variant with an image."""

    pipeline_name = "TwinPipeline"

    def add_stage(self, stage: StageSpec) -> None:
        """Append a stage; replaces the toy family's text encoder."""
        if stage.service == "text_encoding":
            stage = replace(stage, implementation=_TEXT_ENCODER)
        super().add_stage(stage)

    @classmethod
    def variants(cls, checkpoint: Checkpoint) -> Mapping[str, type[ComposedPipeline]]:
        """Return both variants; only the variant "image" requires the module `lens`."""
        del checkpoint
        return {"text": cls, "image": TwinImagePipeline}


class TwinImagePipeline(ToyPipeline):
    """The variant with an image, whose latents the denoiser reads."""

    pipeline_name = "TwinPipeline"
    _required_config_modules = ("palette", "transformer", "lens")
    given: ClassVar[Mapping[str, str]] = {**ToyPipeline.given, "image_inputs": "ImageInputs"}

    def add_stage(self, stage: StageSpec) -> None:
        """Append a stage; adds image encoding after text encoding, and replaces the denoiser."""
        match stage.service:
            case "text_encoding":
                super().add_stage(replace(stage, implementation=_TEXT_ENCODER))
                lens = StageSpec(
                    contracts.IMAGE_VAE_ENCODING,
                    "image_encoding",
                    "twin_stages:TwinImageEncodingStage",
                    {"lens": "lens"},
                    cost=Cost.PIXEL,
                )
                super().add_stage(lens)
            case "denoising":
                reading = contracts.DENOISING.reading("image_latents")
                super().add_stage(replace(stage, contract=reading, implementation="twin_stages:TwinDenoisingStage"))
            case _:
                super().add_stage(stage)


def register_configs(registry: Registry) -> None:
    """Register the configs of both variants."""
    registry.register_configs(
        TwinPipeline.pipeline_name,
        variant="text",
        sampling_params="toy_sample:ToySamplingParams",
        pipeline_config="twin_config:TwinPipelineConfig",
    )
    registry.register_configs(
        TwinPipeline.pipeline_name,
        variant="image",
        sampling_params="twin_sample:TwinImageSamplingParams",
        pipeline_config="twin_config:TwinImagePipelineConfig",
    )


EntryClass = TwinPipeline
