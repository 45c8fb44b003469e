"""Callbacks shared by models with packed latents: a token is a 2x2 patch of latents."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from torch import Tensor

from common.errors import CheckpointError
from configs.models.fields import ConfigFields
from configs.pipeline_configs.base import (
    NEGATIVE,
    POSITIVE,
    DecodingConfig,
    DenoisingConfig,
    NegativePromptConfig,
    Parts,
    PreparationConfig,
    Step,
)
from configs.pipeline_configs.guidance import wants_true_guidance

if TYPE_CHECKING:
    from common.artifacts import Canvas, Prompt, Sampling


CONDITION = "condition"
"""Latent part of the first input image; parts of further images have a numeric suffix."""


@dataclass(frozen=True, kw_only=True)
class SequenceShift:
    """The schedule's shift mu, a linear function of the number of image tokens through two points."""

    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    base_shift: float = 0.5
    max_shift: float = 1.15

    @classmethod
    def from_dict(cls, module: str, values: Mapping[str, Any], defaults: Self | None = None) -> Self:
        """Parse the scheduler's config; `defaults` has the values of missing entries. Raises CheckpointError."""
        fields, default = ConfigFields(module, values), defaults or cls()
        shift = cls(
            base_image_seq_len=fields.integer("base_image_seq_len", default.base_image_seq_len),
            max_image_seq_len=fields.integer("max_image_seq_len", default.max_image_seq_len),
            base_shift=fields.number("base_shift", default.base_shift),
            max_shift=fields.number("max_shift", default.max_shift),
        )
        if shift.base_image_seq_len == shift.max_image_seq_len:
            raise fields.error("max_image_seq_len", "different from base_image_seq_len")
        return shift

    def mu(self, tokens: int) -> float:
        """mu for an image of `tokens` tokens."""
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        return tokens * slope + (self.base_shift - slope * self.base_image_seq_len)


@dataclass(frozen=True, kw_only=True)
class PackedPipelineConfig(NegativePromptConfig, PreparationConfig, DenoisingConfig, DecodingConfig):
    """Callbacks for packed latents, true classifier-free guidance and a size-dependent schedule shift."""

    shift: SequenceShift

    part_keywords: ClassVar[Mapping[str, str]] = {"image": "hidden_states"}
    visual_part: ClassVar[str] = "image"

    @property
    @abstractmethod
    def pixels_per_latent(self) -> int:
        """Pixels along each side of a latent."""

    def patches(self, canvas: Canvas) -> tuple[int, int]:
        """Rows and columns of the token grid."""
        side = 2 * self.pixels_per_latent
        return canvas.height // side, canvas.width // side

    def wants_negative(self, prompt: Prompt, sampling: Sampling) -> bool:
        """Whether true guidance is enabled: a scale above 1 and a (possibly empty) negative prompt."""
        return wants_true_guidance(prompt, sampling)

    def sigmas(self, sampling: Sampling) -> Sequence[float]:
        """The request's sigmas, or evenly spaced from 1 to 1/steps."""
        steps = sampling.num_inference_steps
        return sampling.sigmas or np.linspace(1.0, 1.0 / steps, steps).tolist()

    def mu(self, canvas: Canvas) -> float | None:
        """The shift from the number of image tokens; a scheduler without dynamic shifting ignores it."""
        rows, columns = self.patches(canvas)
        return self.shift.mu(rows * columns)

    def model_timestep(self, timesteps: Tensor) -> Tensor:
        """Scale [0, 1000] to [0, 1]."""
        return timesteps / 1000

    def guide(self, predictions: Mapping[str, Parts], latents: Parts, step: Step, sampling: Sampling) -> Parts:
        """Classifier-free guidance with `true_cfg_scale`."""
        del latents, step
        positive, negative = predictions[POSITIVE]["image"], predictions[NEGATIVE]["image"]
        return {"image": self.guided(positive, negative, sampling.true_cfg_scale or 1.0)}

    def guided(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Combine a positive and a negative prediction, both (B, tokens, channels)."""
        return negative + scale * (positive - negative)


def pack_patches(raw: Tensor) -> Tensor:
    """(B, C, 2h, 2w) to (B, h*w, 4C); channels ordered (c, dy, dx)."""
    batch, channels, rows, columns = raw.shape
    patches = raw.reshape(batch, channels, rows // 2, 2, columns // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(batch, (rows // 2) * (columns // 2), channels * 4)


def unpack_patches(latents: Tensor, channels: int, rows: int, columns: int) -> Tensor:
    """(B, h*w, 4C) to (B, C, 2h, 2w), where rows is 2h and columns 2w."""
    batch = latents.shape[0]
    patches = latents.view(batch, rows // 2, columns // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels, rows, columns)


def condition_name(index: int) -> str:
    """Name of the latent part of an input image, by index from 0."""
    return f"{CONDITION}_{index}" if index else CONDITION


def condition_parts(parts: Collection[str]) -> list[str]:
    """Names of the input images' parts in `parts`, in image order: condition, condition_1 ..."""
    return sorted((part for part in parts if part.startswith(CONDITION)), key=lambda part: (len(part), part))


def check_channels(inputs: int, outputs: int, latent_channels: int) -> None:
    """Check that the transformer's channels equal the VAE's latent channels. Raises CheckpointError."""
    if not inputs == outputs == latent_channels:
        raise CheckpointError(
            f"transformer/config.json: {inputs} input and {outputs} output channels are not {latent_channels}, "
            f"the VAE's latent channels"
        )


def check_patch_channels(inputs: int, outputs: int, latent_channels: int) -> None:
    """Check that the transformer's channels equal the channels of a 2x2 patch of latents. Raises CheckpointError."""
    expected = 4 * latent_channels
    if not inputs == outputs == expected:
        raise CheckpointError(
            f"transformer/config.json: {inputs} input and {outputs} output channels are not {expected}, the channels "
            f"of 2x2 patches of the VAE's {latent_channels} latent channels"
        )


def check_text_size(size: int, encoder: str, expected: int) -> None:
    """Check that the text encoder's features equal the transformer's text features. Raises CheckpointError."""
    if size != expected:
        raise CheckpointError(
            f"{encoder}: {size} text features are not {expected}, the number that the transformer reads"
        )
