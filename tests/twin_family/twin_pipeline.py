"""A family with two variants over one directory, as plugin files: the toy family, and the same tinted by an image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from toy_pipeline import ToyPipeline

from common.pipeline import ComposedPipeline, StageSpec
from models import contracts
from models.registry import Registry

if TYPE_CHECKING:
    from common.checkpoint import Checkpoint


_TEXT_ENCODER = "twin_stages:TwinTextEncodingStage"


class TwinPipeline(ToyPipeline):
    """Text to image, and text and image to image."""

    pipeline_name = "TwinPipeline"

    def add_stage(self, stage: StageSpec) -> None:
        """Append a stage, with the family's own text encoder in place of the toy family's."""
        if stage.service == "text_encoding":
            stage = replace(stage, implementation=_TEXT_ENCODER)
        super().add_stage(stage)

    @classmethod
    def variants(cls, checkpoint: Checkpoint) -> Mapping[str, type[ComposedPipeline]]:
        """Only the second variant needs the module `lens`."""
        del checkpoint
        return {"text": cls, "image": TwinImagePipeline}


class TwinImagePipeline(ComposedPipeline):
    """The variant with an image, whose latents the denoiser reads."""

    pipeline_name = "TwinPipeline"
    _required_config_modules = ("palette", "transformer", "lens")
    given: ClassVar[Mapping[str, str]] = {**ComposedPipeline.given, "image_inputs": "ImageInputs"}

    def create_pipeline_stages(self) -> None:
        """Text and image to image."""
        preparation = "latent_preparation"
        for contract, service, name, modules in (
            (contracts.TEXT_ENCODING, "text_encoding", _TEXT_ENCODER, ("palette",)),
            (contracts.IMAGE_VAE_ENCODING, "image_encoding", "twin_stages:TwinImageEncodingStage", ("lens",)),
            (contracts.LATENT_PREPARATION, preparation, "toy_stages:ToyLatentPreparationStage", ()),
            (contracts.TIMESTEP_PREPARATION, preparation, "toy_stages:ToyTimestepPreparationStage", ()),
            (contracts.DENOISING, "denoising", "twin_stages:TwinDenoisingStage", ("transformer",)),
            (contracts.DECODING, "decoding", "toy_stages:ToyDecodingStage", ()),
        ):
            self.add_stage(StageSpec(contract, service, name, modules))


def register_configs(registry: Registry) -> None:
    """Name the configs of both variants."""
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
