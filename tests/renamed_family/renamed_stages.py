"""Stages of the renamed toy family: the toy family's stages with different slots and module roles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import renamed_slots as slots
import toy_stages

from common.stage import Call, PipelineStage
from configs.pipeline_configs.base import PipelineConfig
from models import contracts
from models.runtime import Runtime


class ReadingStage(PipelineStage[slots.ReadingInput, slots.ReadingOutput]):
    """Encodes the words."""

    def __init__(self, config: PipelineConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._stage = toy_stages.ToyTextEncodingStage(config, runtime, {"palette": modules["paints"]})

    def run(self, x: slots.ReadingInput, call: Call) -> slots.ReadingOutput:
        """Encode the words."""
        done = self._stage.run(contracts.TextEncodingInput(prompt=x.words, sampling=x.rules), call)
        return slots.ReadingOutput(colour=done.text_conditioning)


class SprinklingStage(PipelineStage[slots.SprinklingInput, slots.SprinklingOutput]):
    """Draws the noise. Raises AssertionError if the output `dice` is requested."""

    def __init__(self, config: PipelineConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._stage = toy_stages.ToyLatentPreparationStage(config, runtime, modules)

    def run(self, x: slots.SprinklingInput, call: Call) -> slots.SprinklingOutput:
        """Draw the noise."""
        if self.writes("dice"):
            raise AssertionError("dice: no stage of this pipeline reads this output")
        done = self._stage.run(contracts.LatentPreparationInput(canvas=x.page, sampling=x.rules), call)
        return slots.SprinklingOutput(speckles=done.initial_latents)


class ClimbingStage(PipelineStage[slots.ClimbingInput, slots.ClimbingOutput]):
    """Computes the schedule."""

    def __init__(self, config: PipelineConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._stage = toy_stages.ToyTimestepPreparationStage(config, runtime, modules)

    def run(self, x: slots.ClimbingInput, call: Call) -> slots.ClimbingOutput:
        """Compute the schedule."""
        done = self._stage.run(contracts.TimestepPreparationInput(canvas=x.page, sampling=x.rules), call)
        return slots.ClimbingOutput(ladder=done.schedule)


class PaintingStage(PipelineStage[slots.PaintingInput, slots.PaintingOutput]):
    """Runs the loop, with a step checkpoint after each step."""

    def __init__(self, config: PipelineConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._stage = toy_stages.ToyDenoisingStage(config, runtime, {"gain": modules["brush"]})

    def run(self, x: slots.PaintingInput, call: Call) -> slots.PaintingOutput:
        """Run all steps of the schedule."""
        inputs = contracts.DenoisingInput(
            initial_latents=x.speckles,
            schedule=x.ladder,
            text_conditioning=x.colour,
            sampling=x.rules,
            resume_from=x.unfinished,
        )
        return slots.PaintingOutput(painting=self._stage.run(inputs, call).denoised_latents)


class FramingStage(PipelineStage[slots.FramingInput, slots.FramingOutput]):
    """Decodes the painting into files."""

    def __init__(self, config: PipelineConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._stage = toy_stages.ToyDecodingStage(config, runtime, modules)

    def run(self, x: slots.FramingInput, call: Call) -> slots.FramingOutput:
        """Encode the files."""
        done = self._stage.run(contracts.DecodingInput(denoised_latents=x.painting, canvas=x.page), call)
        return slots.FramingOutput(exhibits=done.media)
