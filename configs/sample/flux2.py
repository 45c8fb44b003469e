"""Sampling parameters of FLUX.2, following Diffusers 0.42's Flux2Pipeline."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Self

from common.artifacts import ParamValue
from common.checkpoint import Checkpoint
from common.errors import InvalidInput
from common.image_header import MAX_IMAGES, ImageHeader
from configs.models.vaes.flux2 import area_limited
from configs.sample.base import ImageRoles, ParamWarning, parameter
from configs.sample.flux import vae_scale_factor
from configs.sample.shift_terminal import check_stretched
from configs.sample.sigmas import SigmasSamplingParams

MIN_IMAGE_SIDE = 64
"""Minimum width and height of a reference image, in pixels."""
MAX_ASPECT_RATIO = 8
"""Maximum ratio of the longer to the shorter side of a reference image."""

_DEFAULT_LATENT_SIZE = 128
_PATCH = 2


@dataclass(frozen=True, kw_only=True)
class Flux2SamplingParams(SigmasSamplingParams):
    """FLUX.2 dev. The model embeds guidance_scale; there is no negative prompt.

    The shift of the noise levels depends on the number of steps. If sigmas replace num_inference_steps, shift_steps
    stores the original value for the shift.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 4.0
    max_sequence_length: int = parameter(
        "Maximum number of tokens for the text encoder, including the chat template.", 512, minimum=1, maximum=512
    )
    shift_steps: int | None = parameter(
        "Number of steps that determines the shift of custom sigmas.",
        None,
        minimum=1,
        maximum=1000,
        unset="the requested num_inference_steps is used",
    )

    @classmethod
    def model_defaults(cls, checkpoint: Checkpoint) -> dict[str, ParamValue]:
        """The native size, 128 x 128 latents."""
        side = _DEFAULT_LATENT_SIZE * vae_scale_factor(checkpoint)
        return {"height": side, "width": side}

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Round the size down to whole patches, apply sigmas, and drop parameters without effect."""
        params, warnings = self.floored_size(_PATCH * vae_scale_factor(checkpoint))
        # Diffusers computes the shift from num_inference_steps even if sigmas set a different number of steps.
        asked = params.num_inference_steps if params.shift_steps is None else params.shift_steps
        params, more = params.with_steps_of_sigmas(given)
        params = replace(params, shift_steps=asked if params.sigmas else None)
        check_stretched(checkpoint, params.num_inference_steps, params.sigmas)
        idle = []
        if self.shift_steps is not None and not self.sigmas:
            idle.append(ParamWarning("shift_steps", "no effect without sigmas"))
        if params.negative_prompt is not None:
            params = replace(params, negative_prompt=None)
            idle.append(ParamWarning("negative_prompt", "no effect on this model"))
        return params, (*warnings, *more, *idle)


@dataclass(frozen=True, kw_only=True)
class Flux2ImageSamplingParams(Flux2SamplingParams):
    """FLUX.2 dev with reference images.

    The default size is the size of the first image, reduced to the VAE's maximum area.
    """

    @classmethod
    def image_roles(cls, checkpoint: Checkpoint) -> ImageRoles:
        """One or more images, ordered by number; Diffusers sets no limit."""
        del checkpoint
        return ImageRoles(required=("image",), optional=tuple(f"image_{index}" for index in range(1, MAX_IMAGES)))

    @classmethod
    def image_defaults(
        cls, images: Mapping[str, ImageHeader], values: Mapping[str, ParamValue]
    ) -> dict[str, ParamValue]:
        """The encoded size of the first image, before it is cropped to whole patches."""
        del values
        for role, header in images.items():
            check_reference(role, header)
        if "image" not in images:
            return {}
        height, width = area_limited(images["image"].height, images["image"].width)
        return {"height": height, "width": width}

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Validate as the base class does, but without a warning about a default size."""
        params, warnings = super().round_and_validate(checkpoint, given)
        sizes = {"height", "width"} - set(given)
        return params, tuple(each for each in warnings if each.field not in sizes)


def check_reference(role: str, header: ImageHeader) -> None:
    """Check the size and the aspect ratio of an image. Raises InvalidInput with the role."""
    shorter, longer = sorted((header.height, header.width))
    size = f"{role}: {header.width} x {header.height}"
    if shorter < MIN_IMAGE_SIDE:
        message = f"{size} is not at least {MIN_IMAGE_SIDE} pixels along each side; a larger image works"
        raise InvalidInput(message, field=role)
    if longer > MAX_ASPECT_RATIO * shorter:
        message = f"{size} has an aspect ratio that is not at most {MAX_ASPECT_RATIO}; a crop works"
        raise InvalidInput(message, field=role)
