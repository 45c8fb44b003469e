"""The values that flow between stages. Each class mirrors a message of proto/fleet/v1/artifacts.proto.

The message has the same name, unless MESSAGES says otherwise.

Tensors are torch tensors, but nothing here imports torch: the coordinator reads these names and never opens a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ParamValue = bool | int | float | str | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the user asked to see. An absent negative prompt is not an empty one."""

    prompt: str
    negative_prompt: str | None = None
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    max_sequence_length: int | None = None


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """Extent (pixels, frames, frames a second) and format ("png", "mp4", "safetensors") of what is made."""

    height: int
    width: int
    num_frames: int = 1
    frame_rate: float | None = None
    output_format: str = "png"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample. params holds what only this family has, under the Diffusers names."""

    num_inference_steps: int
    seed: int
    num_outputs_per_prompt: int = 1
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    sigmas: tuple[float, ...] = ()
    params: Mapping[str, ParamValue] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ImageInputs:
    """Encoded image files by role: uint8 (bytes,), or plain bytes where there is no torch."""

    images: Mapping[str, Tensor | bytes]


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Keyword tensors for the denoiser's prepare(), batch 1; no negative ones without classifier-free guidance."""

    prompt_embeds: Mapping[str, Tensor]
    negative_prompt_embeds: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """timesteps (num_inference_steps,) and sigmas float32 (num_inference_steps + 1,)."""

    timesteps: Tensor
    sigmas: Tensor
    num_inference_steps: int


@dataclass(frozen=True, kw_only=True)
class LatentPart:
    """Latents in the denoiser's layout, and the shape that they have unpacked."""

    latents: Tensor
    raw_latent_shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Latents:
    """A point in latent space; parts are named "image", "video", "audio", "condition"."""

    parts: Mapping[str, LatentPart]


@dataclass(frozen=True, kw_only=True)
class Generator:
    """State of torch's CPU generator, uint8 (5056,), after the draws that its slot's writer made."""

    seed: int
    state: Tensor


MESSAGES: Mapping[str, str] = MappingProxyType({"StepCheckpoint": "DenoiseState"})
"""Messages whose names differ from those of their artifacts: renaming a message breaks clients and older workers."""


def message_name(artifact: str) -> str:
    """The message of an artifact, by their names in contracts and in Python."""
    return MESSAGES.get(artifact, artifact)


def artifact_name(message: str) -> str:
    """The artifact of a message; the reverse of message_name()."""
    return next((artifact for artifact, name in MESSAGES.items() if name == message), message)


STEP_CHECKPOINT_FORMAT = 2
"""Counts the meanings that the fields of StepCheckpoint have had: a version that changes them resumes no older ones."""


@dataclass(frozen=True, kw_only=True)
class StepCheckpoint:
    """A denoising loop stopped after `step` steps: enough to continue it to the same bytes."""

    step: int
    latents: Latents
    solver: Mapping[str, Tensor] = field(default_factory=dict)
    generator: Generator | None = None


@dataclass(frozen=True, kw_only=True)
class MediaItem:
    """A finished file, uint8 (bytes,), or in a stream the next bytes of one: those of `num_frames` more frames.

    Of a result with `file_count` files it belongs to the one with index `file_index`.
    """

    data: Tensor
    content_type: str
    height: int
    width: int
    num_frames: int = 1
    file_index: int = 0
    file_count: int = 1


@dataclass(frozen=True, kw_only=True)
class Media:
    """The finished files of a request, in the order they were drawn."""

    items: tuple[MediaItem, ...]
