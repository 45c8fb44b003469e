"""Sampling parameters of FLUX.2, as Diffusers 0.42's Flux2Pipeline takes and rounds them."""

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
from configs.sample.sigmas import SigmasSamplingParams
from configs.sample.terminal import check_stretched

SHORTEST_SIDE = 64
"""Smallest width and height of a reference image, in pixels."""
MOST_ASPECT = 8
"""Largest ratio of a reference image's longer side to its shorter one."""

_DEFAULT_LATENT_SIZE = 128
_PATCH = 2


@dataclass(frozen=True, kw_only=True)
class Flux2SamplingParams(SigmasSamplingParams):
    """FLUX.2 dev. guidance_scale is embedded; there is no negative prompt.

    shift_steps stores the num_inference_steps that sigmas replace: the shift of the noise levels depends on it.
    """

    num_inference_steps: int = 50
    guidance_scale: float = 4.0
    max_sequence_length: int = parameter(
        "Tokens that the text encoder reads, the chat template's included.", 512, minimum=1, maximum=512
    )
    shift_steps: int | None = parameter(
        "Number of steps for which custom sigmas are shifted.",
        None,
        minimum=1,
        maximum=1000,
        unset="num_inference_steps, as it was before sigmas replaced it",
    )

    @classmethod
    def model_defaults(cls, checkpoint: Checkpoint) -> dict[str, ParamValue]:
        """The native size, 128 latents a side."""
        side = _DEFAULT_LATENT_SIZE * vae_scale_factor(checkpoint)
        return {"height": side, "width": side}

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Floor the size to whole patches; sigmas decide the steps; drop what has no effect, with a warning."""
        params, warnings = self.floored_size(_PATCH * vae_scale_factor(checkpoint))
        # Diffusers computes the shift from num_inference_steps, also where sigmas set another number of steps.
        asked = params.num_inference_steps if params.shift_steps is None else params.shift_steps
        params, more = params.with_steps_of_sigmas(given)
        params = replace(params, shift_steps=asked if params.sigmas else None)
        check_stretched(checkpoint, params.num_inference_steps, params.sigmas)
        idle = []
        if self.shift_steps is not None and not self.sigmas:
            idle.append(ParamWarning("shift_steps", "shift_steps has no effect without sigmas"))
        if params.negative_prompt is not None:
            params = replace(params, negative_prompt=None)
            idle.append(ParamWarning("negative_prompt", "negative_prompt has no effect: this model takes none"))
        return params, (*warnings, *more, *idle)


@dataclass(frozen=True, kw_only=True)
class Flux2ImageSamplingParams(Flux2SamplingParams):
    """The same with reference images. The result has the size of the first one, unless a size is set."""

    @classmethod
    def image_roles(cls, checkpoint: Checkpoint) -> ImageRoles:
        """One image or more, in the order of their numbers; Diffusers sets no limit."""
        del checkpoint
        return ImageRoles(required=("image",), optional=tuple(f"image_{index}" for index in range(1, MAX_IMAGES)))

    @classmethod
    def image_defaults(
        cls, images: Mapping[str, ImageHeader], values: Mapping[str, ParamValue]
    ) -> dict[str, ParamValue]:
        """The size in which the first image is encoded, before it is cropped to whole patches."""
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
        """No warning about the size of an image, which nobody asked for."""
        params, warnings = super().round_and_validate(checkpoint, given)
        sizes = {"height", "width"} - set(given)
        return params, tuple(each for each in warnings if each.field not in sizes)


def check_reference(role: str, header: ImageHeader) -> None:
    """Refuse an image that is too small or too long. Raises InvalidInput about the role."""
    shorter, longer = sorted((header.height, header.width))
    size = f"{role}: {header.width} x {header.height}"
    if shorter < SHORTEST_SIDE:
        message = f"{size} is not at least {SHORTEST_SIDE} pixels a side; a larger image works"
        raise InvalidInput(message, field=role)
    if longer > MOST_ASPECT * shorter:
        message = f"{size} is not at most {MOST_ASPECT} times as long as it is wide; a crop of it works"
        raise InvalidInput(message, field=role)
