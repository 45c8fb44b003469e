"""Inputs and outputs of the standard stages. Their fields are the slots of a pipeline.

Artifacts are named in annotations only, so that the coordinator can read the contracts without torch.
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
    """What a text encoder reads."""

    prompt: Prompt
    sampling: Sampling


@dataclass(frozen=True, kw_only=True)
class TextEncodingOutput:
    """What a text encoder writes."""

    text_conditioning: Conditioning


@dataclass(frozen=True, kw_only=True)
class ImageTextEncodingInput:
    """What a text encoder reads that looks at pictures too."""

    prompt: Prompt
    sampling: Sampling
    image_inputs: ImageInputs


@dataclass(frozen=True, kw_only=True)
class ImageEncodingInput:
    """What a vision encoder reads."""

    image_inputs: ImageInputs


@dataclass(frozen=True, kw_only=True)
class ImageEncodingOutput:
    """What a vision encoder writes."""

    image_conditioning: Conditioning


@dataclass(frozen=True, kw_only=True)
class ImageVAEEncodingInput:
    """Inputs of a VAE's encoder. Pipelines name the optional one where they use it."""

    image_inputs: ImageInputs
    canvas: Canvas
    sampling: Sampling | None = None


@dataclass(frozen=True, kw_only=True)
class ImageVAEEncodingOutput:
    """Pictures as latents: the part "condition", beside the noise."""

    image_latents: Latents


@dataclass(frozen=True, kw_only=True)
class LatentPreparationInput:
    """What the draw of the starting noise depends on."""

    canvas: Canvas
    sampling: Sampling


@dataclass(frozen=True, kw_only=True)
class LatentPreparationOutput:
    """The starting noise and, for loops that draw, the generator after the draw."""

    initial_latents: Latents
    latents_generator: Generator | None = None


@dataclass(frozen=True, kw_only=True)
class TimestepPreparationInput:
    """What the steps depend on."""

    canvas: Canvas
    sampling: Sampling


@dataclass(frozen=True, kw_only=True)
class TimestepPreparationOutput:
    """The steps of the loop."""

    schedule: Schedule


@dataclass(frozen=True, kw_only=True)
class BeforeDenoisingInput:
    """What a hybrid model's stage reads: the whole request. Pipelines name the optional input where they use it."""

    prompt: Prompt
    canvas: Canvas
    sampling: Sampling
    image_inputs: ImageInputs | None = None


@dataclass(frozen=True, kw_only=True)
class BeforeDenoisingOutput:
    """What a hybrid model's stage writes: all that the denoising loop reads."""

    text_conditioning: Conditioning
    initial_latents: Latents
    schedule: Schedule
    image_latents: Latents | None = None


@dataclass(frozen=True, kw_only=True)
class DenoisingInput:
    """Inputs of the denoising loop, which continues from `resume_from`. Pipelines name the optional ones they use."""

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
    """The loop's result and, for decoders that draw, the generator after it."""

    denoised_latents: Latents
    denoising_generator: Generator | None = None


@dataclass(frozen=True, kw_only=True)
class BlockDenoisingOutput:
    """The result of a loop that denoises block after block: the latents of each as it is finished, all outputs'."""

    denoised_blocks: Stream[Latents] = EMITTED


@dataclass(frozen=True, kw_only=True)
class DecodingInput:
    """What a decoder reads."""

    denoised_latents: Latents
    canvas: Canvas


@dataclass(frozen=True, kw_only=True)
class VideoDecodingInput(DecodingInput):
    """What a decoder of videos reads. Pipelines name the optional inputs, which are for decoders that draw."""

    sampling: Sampling | None = None
    denoising_generator: Generator | None = None


@dataclass(frozen=True, kw_only=True)
class BlockDecodingInput:
    """What a decoder reads of a video that comes block by block, in the order of time."""

    denoised_blocks: Stream[Latents]
    canvas: Canvas


@dataclass(frozen=True, kw_only=True)
class DecodingOutput:
    """The finished files."""

    media: Media


@dataclass(frozen=True, kw_only=True)
class StreamedDecodingOutput:
    """The files of videos, part by part: what has been emitted of a file can be shown at once."""

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
