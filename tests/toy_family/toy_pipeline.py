"""A complete family as plugin files: it generates noise around a color that the prompt determines.

Tests copy this folder to a temporary directory and serve it from there, to verify that a new family needs no edit in
common/, models/ or services/. Like every pipeline file, this file is imported by the coordinator, so it imports no
torch.
"""

from __future__ import annotations

from typing import ClassVar

from common.pipeline import ComposedPipeline, Cost, StageSpec
from models import contracts
from models.registry import Registry


class ToyPipeline(ComposedPipeline):
    """A pipeline with its own stages in the standard slots and services."""

    pipeline_name = "ToyPipeline"
    _required_config_modules: ClassVar[tuple[str, ...]] = ("palette", "transformer")

    def create_pipeline_stages(self) -> None:
        """Text to image."""
        preparation, denoising = "latent_preparation", contracts.DENOISING.reading()
        for stage in (
            StageSpec(
                contracts.TEXT_ENCODING, "text_encoding", "toy_stages:ToyTextEncodingStage", {"palette": "palette"}
            ),
            StageSpec(
                contracts.LATENT_PREPARATION, preparation, "toy_stages:ToyLatentPreparationStage", cost=Cost.PIXEL
            ),
            StageSpec(contracts.TIMESTEP_PREPARATION, preparation, "toy_stages:ToyTimestepPreparationStage"),
            StageSpec(
                denoising,
                "denoising",
                "toy_stages:ToyDenoisingStage",
                {"gain": "transformer"},
                cost=Cost.PIXEL_STEP,
                reports_steps=True,
            ),
            StageSpec(contracts.DECODING, "decoding", "toy_stages:ToyDecodingStage", cost=Cost.PIXEL, result="media"),
        ):
            self.add_stage(stage)


def register_configs(registry: Registry) -> None:
    """Register the family's configs."""
    registry.register_configs(
        ToyPipeline.pipeline_name,
        sampling_params="toy_sample:ToySamplingParams",
        pipeline_config="toy_config:ToyPipelineConfig",
    )


EntryClass = ToyPipeline
