"""A whole second family as plugin files: it paints a speckled plane in a colour that the prompt decides.

Tests copy this folder to a temporary directory and serve it from there, to show that a new family needs no edit in
common/, models/ or services/. Like every pipeline file it is read by the coordinator, so it imports no torch.
"""

from __future__ import annotations

from common.pipeline import ComposedPipeline, StageSpec
from models import contracts
from models.registry import Registry


class ToyPipeline(ComposedPipeline):
    """Stages of its own in the standard slots and services."""

    pipeline_name = "ToyPipeline"
    _required_config_modules = ("palette", "transformer")

    def create_pipeline_stages(self) -> None:
        """Text to image."""
        preparation = "latent_preparation"
        for contract, service, name, modules in (
            (contracts.TEXT_ENCODING, "text_encoding", "ToyTextEncodingStage", ("palette",)),
            (contracts.LATENT_PREPARATION, preparation, "ToyLatentPreparationStage", ()),
            (contracts.TIMESTEP_PREPARATION, preparation, "ToyTimestepPreparationStage", ()),
            (contracts.DENOISING, "denoising", "ToyDenoisingStage", ("transformer",)),
            (contracts.DECODING, "decoding", "ToyDecodingStage", ()),
        ):
            self.add_stage(StageSpec(contract, service, f"toy_stages:{name}", modules))


def register_configs(registry: Registry) -> None:
    """Name the family's configs."""
    registry.register_configs(
        ToyPipeline.pipeline_name,
        sampling_params="toy_sample:ToySamplingParams",
        pipeline_config="toy_config:ToyPipelineConfig",
    )


EntryClass = ToyPipeline
