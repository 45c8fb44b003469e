"""The toy family with its own names of slots, roles and services. The coordinator must not depend on standard names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import renamed_slots as slots

from common.pipeline import ComposedPipeline, Cost, StageSpec
from models.registry import Registry


class RenamedToyPipeline(ComposedPipeline):
    """A pipeline whose stages, slots and services all have their own names."""

    pipeline_name = "RenamedToyPipeline"
    _required_config_modules = ("palette", "transformer")
    given: ClassVar[Mapping[str, str]] = {"words": "Prompt", "page": "Canvas", "rules": "Sampling"}

    def create_pipeline_stages(self) -> None:
        """Text to image."""
        for stage in (
            StageSpec(slots.READING, "toy_reading", "renamed_stages:ReadingStage", {"paints": "palette"}),
            StageSpec(slots.SPRINKLING, "toy_mixing", "renamed_stages:SprinklingStage", cost=Cost.PIXEL),
            StageSpec(slots.CLIMBING, "toy_mixing", "renamed_stages:ClimbingStage"),
            StageSpec(
                slots.PAINTING,
                "toy_painting",
                "renamed_stages:PaintingStage",
                {"brush": "transformer"},
                cost=Cost.PIXEL_STEP,
                reports_steps=True,
            ),
            StageSpec(slots.FRAMING, "toy_framing", "renamed_stages:FramingStage", cost=Cost.PIXEL, result="exhibits"),
        ):
            self.add_stage(stage)


def register_configs(registry: Registry) -> None:
    """Register the toy family's configs for this pipeline."""
    registry.register_configs(
        RenamedToyPipeline.pipeline_name,
        sampling_params="toy_sample:ToySamplingParams",
        pipeline_config="toy_config:ToyPipelineConfig",
    )


EntryClass = RenamedToyPipeline
