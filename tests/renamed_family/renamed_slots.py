"""Inputs and outputs of the renamed toy family: no slot has a name of the standard stages. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.stage import RESUME, derive_contract

if TYPE_CHECKING:
    from common.artifacts import (
        Canvas,
        Conditioning,
        Generator,
        Latents,
        Media,
        Prompt,
        Sampling,
        Schedule,
        StepCheckpoint,
    )


@dataclass(frozen=True, kw_only=True)
class ReadingInput:
    """Inputs of the text encoder."""

    words: Prompt
    rules: Sampling


@dataclass(frozen=True, kw_only=True)
class ReadingOutput:
    """Output of the text encoder."""

    colour: Conditioning


@dataclass(frozen=True, kw_only=True)
class SprinklingInput:
    """Inputs of the noise stage."""

    page: Canvas
    rules: Sampling


@dataclass(frozen=True, kw_only=True)
class SprinklingOutput:
    """Outputs of the noise stage. No stage reads `dice`, for which the RPC has no field."""

    speckles: Latents
    dice: Generator | None = None


@dataclass(frozen=True, kw_only=True)
class ClimbingInput:
    """Inputs of the schedule stage."""

    page: Canvas
    rules: Sampling


@dataclass(frozen=True, kw_only=True)
class ClimbingOutput:
    """Outputs of the schedule stage."""

    ladder: Schedule


@dataclass(frozen=True, kw_only=True)
class PaintingInput:
    """Inputs of the loop, which resumes from `unfinished`."""

    speckles: Latents
    ladder: Schedule
    colour: Conditioning
    rules: Sampling
    unfinished: StepCheckpoint | None = field(default=None, metadata=RESUME)


@dataclass(frozen=True, kw_only=True)
class PaintingOutput:
    """Latents after the loop."""

    painting: Latents


@dataclass(frozen=True, kw_only=True)
class FramingInput:
    """Inputs of the decoder."""

    painting: Latents
    page: Canvas


@dataclass(frozen=True, kw_only=True)
class FramingOutput:
    """Output files."""

    exhibits: Media


READING = derive_contract("ReadingStage", ReadingInput, ReadingOutput)
SPRINKLING = derive_contract("SprinklingStage", SprinklingInput, SprinklingOutput)
CLIMBING = derive_contract("ClimbingStage", ClimbingInput, ClimbingOutput)
PAINTING = derive_contract("PaintingStage", PaintingInput, PaintingOutput)
FRAMING = derive_contract("FramingStage", FramingInput, FramingOutput)
