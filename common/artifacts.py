"""Artifacts: the values that stages exchange. Each class mirrors a message of proto/fleet/v1/artifacts.proto.

Class and message have the same name, except for the names in MESSAGES. Tensors are torch tensors, but this module does
not import torch: the coordinator uses these classes and never reads a tensor.
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
    """Prompts of a request. An absent negative prompt differs from an empty one."""

    prompt: str
    negative_prompt: str | None = None
    prompt_2: str | None = None
    negative_prompt_2: str | None = None
    max_sequence_length: int | None = None


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """Size (pixels, frames, frames per second) and format ("png", "mp4", "safetensors") of the output."""

    height: int
    width: int
    num_frames: int = 1
    frame_rate: float | None = None
    output_format: str = "png"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters. `params` contains the model-specific parameters, by their names in Diffusers."""

    num_inference_steps: int
    seed: int
    num_outputs_per_prompt: int = 1
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None
    sigmas: tuple[float, ...] = ()
    params: Mapping[str, ParamValue] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ImageInputs:
    """Encoded image files by role: uint8 (bytes,) tensors, or bytes in processes without torch."""

    images: Mapping[str, Tensor | bytes]


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Keyword tensors for the denoiser's prepare(), with batch size 1.

    `negative_prompt_embeds` is empty without classifier-free guidance.
    """

    prompt_embeds: Mapping[str, Tensor]
    negative_prompt_embeds: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Denoising schedule: timesteps (num_inference_steps,) and sigmas, float32 (num_inference_steps + 1,)."""

    timesteps: Tensor
    sigmas: Tensor
    num_inference_steps: int


@dataclass(frozen=True, kw_only=True)
class LatentPart:
    """Latents of one modality in the denoiser's layout, and their shape before packing."""

    latents: Tensor
    raw_latent_shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Latents:
    """Latents of all modalities; parts are named "image", "video", "audio", "condition", "condition_1" ..."""

    parts: Mapping[str, LatentPart]


@dataclass(frozen=True, kw_only=True)
class Generator:
    """State of torch's CPU generator, uint8 (5056,), after the stage that writes the slot has sampled."""

    seed: int
    state: Tensor


MESSAGES: Mapping[str, str] = MappingProxyType({"StepCheckpoint": "DenoiseState"})
"""Message name by artifact name, if they differ. Renaming a message would break clients and older workers."""


def message_name(artifact: str) -> str:
    """Return the name of an artifact's message."""
    return MESSAGES.get(artifact, artifact)


def artifact_name(message: str) -> str:
    """Return the name of a message's artifact class; the inverse of message_name()."""
    return next((artifact for artifact, name in MESSAGES.items() if name == message), message)


STEP_CHECKPOINT_FORMAT = 2
"""Version of the meaning of StepCheckpoint's fields. Step checkpoints of another version are not resumed."""


@dataclass(frozen=True, kw_only=True)
class StepCheckpoint:
    """State of a denoising loop after `step` steps. A loop that resumes from this state produces the same bytes."""

    step: int
    latents: Latents
    solver: Mapping[str, Tensor] = field(default_factory=dict)
    generator: Generator | None = None


@dataclass(frozen=True, kw_only=True)
class MediaItem:
    """An output file, uint8 (bytes,); in a stream, consecutive bytes of a file.

    The bytes contain `num_frames` frames. `file_index` is the index of the file among the `file_count` files of the
    result.
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
    """The output files of a request, in the order in which their noise was sampled."""

    items: tuple[MediaItem, ...]
