"""Inputs and outputs of the standard stages. Each field is a slot of a pipeline.

Artifact types appear in annotations only, so that the coordinator can read the contracts without importing torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from common.stage import EMITTED, RESUME, Stream, derive_contract

if TYPE_CHECKING:
    from common.artifacts import (
        Canvas,
        Conditioning,
        Generator,
        ImageInputs,
        Latents,
        Media,
        MediaItem,
        Prompt,
        Sampling,
        Schedule,
        StepCheckpoint,
    )


@dataclass(frozen=True, kw_only=True)
class TextEncodingInput:
    """Inputs of a text encoder."""

    prompt: Prompt
    sampling: Sampling


@dataclass(frozen=True, kw_only=True)
class TextEncodingOutput:
    """Output of a text encoder."""

    text_conditioning: Conditioning


@dataclass(frozen=True, kw_only=True)
class ImageTextEncodingInput:
    """Inputs of a text encoder that also reads images."""

    prompt: Prompt
    sampling: Sampling
    image_inputs: ImageInputs


@dataclass(frozen=True, kw_only=True)
class ImageEncodingInput:
    """Input of a vision encoder."""

    image_inputs: ImageInputs


@dataclass(frozen=True, kw_only=True)
class ImageEncodingOutput:
    """Output of a vision encoder."""

    image_conditioning: Conditioning


@dataclass(frozen=True, kw_only=True)
class ImageVAEEncodingInput:
    """Inputs of a VAE's encoder. The stage receives the optional input only if the pipeline lists it."""

    image_inputs: ImageInputs
    canvas: Canvas
    sampling: Sampling | None = None


@dataclass(frozen=True, kw_only=True)
class ImageVAEEncodingOutput:
    """Image latents, in the parts "condition", "condition_1" ..., for the denoising loop."""

    image_latents: Latents


@dataclass(frozen=True, kw_only=True)
class LatentPreparationInput:
    """Inputs for drawing the initial noise."""

    canvas: Canvas
    sampling: Sampling


@dataclass(frozen=True, kw_only=True)
class LatentPreparationOutput:
    """The initial noise and, for loops or decoders that draw noise, the generator after the draw."""

    initial_latents: Latents
    latents_generator: Generator | None = None


@dataclass(frozen=True, kw_only=True)
class TimestepPreparationInput:
    """Inputs for building the schedule."""

    canvas: Canvas
    sampling: Sampling


@dataclass(frozen=True, kw_only=True)
class TimestepPreparationOutput:
    """The schedule of the denoising loop."""

    schedule: Schedule


@dataclass(frozen=True, kw_only=True)
class BeforeDenoisingInput:
    """Inputs of a hybrid model's own stage: the whole request.

    The stage receives the optional input only if the pipeline lists it.
    """

    prompt: Prompt
    canvas: Canvas
    sampling: Sampling
    image_inputs: ImageInputs | None = None


@dataclass(frozen=True, kw_only=True)
class BeforeDenoisingOutput:
    """Outputs of a hybrid model's own stage: all inputs of the denoising loop."""

    text_conditioning: Conditioning
    initial_latents: Latents
    schedule: Schedule
    image_latents: Latents | None = None


@dataclass(frozen=True, kw_only=True)
class DenoisingInput:
    """Inputs of the denoising loop, which resumes from `resume_from` if it is set.

    The stage always receives `resume_from`. It receives another optional input only if the pipeline lists that input.
    """

    initial_latents: Latents
    schedule: Schedule
    text_conditioning: Conditioning
    sampling: Sampling
    image_conditioning: Conditioning | None = None
    image_latents: Latents | None = None
    latents_generator: Generator | None = None
    resume_from: StepCheckpoint | None = field(default=None, metadata=RESUME)


@dataclass(frozen=True, kw_only=True)
class DenoisingOutput:
    """The final latents and, for decoders that draw noise, the generator after the loop."""

    denoised_latents: Latents
    denoising_generator: Generator | None = None


@dataclass(frozen=True, kw_only=True)
class BlockDenoisingOutput:
    """Stream of a causal loop: the latents of each finished block, for all outputs."""

    denoised_blocks: Stream[Latents] = EMITTED


@dataclass(frozen=True, kw_only=True)
class DecodingInput:
    """Inputs of a decoder."""

    denoised_latents: Latents
    canvas: Canvas


@dataclass(frozen=True, kw_only=True)
class VideoDecodingInput(DecodingInput):
    """Inputs of a video decoder. The optional inputs are for decoders that draw noise."""

    sampling: Sampling | None = None
    denoising_generator: Generator | None = None


@dataclass(frozen=True, kw_only=True)
class BlockDecodingInput:
    """Inputs of a video decoder whose latents arrive block by block, in temporal order."""

    denoised_blocks: Stream[Latents]
    canvas: Canvas


@dataclass(frozen=True, kw_only=True)
class DecodingOutput:
    """The finished files."""

    media: Media


@dataclass(frozen=True, kw_only=True)
class StreamedDecodingOutput:
    """Video files as a stream of parts; the parts emitted so far are playable."""

    media_items: Stream[MediaItem] = EMITTED


TEXT_ENCODING = derive_contract("TextEncodingStage", TextEncodingInput, TextEncodingOutput)
IMAGE_TEXT_ENCODING = derive_contract("ImageTextEncodingStage", ImageTextEncodingInput, TextEncodingOutput)
IMAGE_ENCODING = derive_contract("ImageEncodingStage", ImageEncodingInput, ImageEncodingOutput)
IMAGE_VAE_ENCODING = derive_contract("ImageVAEEncodingStage", ImageVAEEncodingInput, ImageVAEEncodingOutput)
LATENT_PREPARATION = derive_contract("LatentPreparationStage", LatentPreparationInput, LatentPreparationOutput)
TIMESTEP_PREPARATION = derive_contract("TimestepPreparationStage", TimestepPreparationInput, TimestepPreparationOutput)
BEFORE_DENOISING = derive_contract("BeforeDenoisingStage", BeforeDenoisingInput, BeforeDenoisingOutput)
DENOISING = derive_contract("DenoisingStage", DenoisingInput, DenoisingOutput)
CAUSAL_DENOISING = derive_contract("CausalDMDDenoisingStage", DenoisingInput, BlockDenoisingOutput)
DECODING = derive_contract("DecodingStage", DecodingInput, DecodingOutput)
VIDEO_DECODING = derive_contract("VideoDecodingStage", VideoDecodingInput, StreamedDecodingOutput)
BLOCK_DECODING = derive_contract("BlockDecodingStage", BlockDecodingInput, StreamedDecodingOutput)
