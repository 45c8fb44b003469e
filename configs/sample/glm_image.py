"""Sampling parameters of GLM-Image, following Diffusers 0.42's GlmImagePipeline."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

from common.checkpoint import Checkpoint
from common.errors import InvalidInput
from configs.sample.base import ParamWarning, parameter
from configs.sample.grid import check_multiples
from configs.sample.shift_terminal import check_stretched
from configs.sample.sigmas import SigmasSamplingParams

GRID = 32
"""Pixels along each side of a token of the autoregressive model."""
_CROP = "crops_coords_top_left"


@dataclass(frozen=True, kw_only=True)
class GlmImageSamplingParams(SigmasSamplingParams):
    """GLM-Image from text. guidance_scale above 1 enables classifier-free guidance by an empty prompt.

    Images are rejected: Diffusers 0.42 accepts them for editing, but always fails.
    """

    height: int = 1024
    width: int = 1024
    num_inference_steps: int = 50
    guidance_scale: float = 1.5
    max_sequence_length: int = parameter(
        "Maximum number of tokens (bytes) of each quoted text for the glyph encoder.", 2048, minimum=1, maximum=2048
    )
    crops_coords_top_left: tuple[float, ...] = parameter(
        "Top and left crop coordinates for conditioning, in pixels; if unset, both are 0.", (), minimum=0.0
    )

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Check that the size fits the autoregressive model's grid, and apply sigmas."""
        check_multiples({"height": self.height, "width": self.width}, GRID)
        if self.crops_coords_top_left and len(self.crops_coords_top_left) != 2:
            count = len(self.crops_coords_top_left)
            raise InvalidInput(f"{_CROP}: a list of length {count} is not [top, left]; two numbers work", field=_CROP)
        params, warnings = self.with_steps_of_sigmas(given)
        check_stretched(checkpoint, params.num_inference_steps, params.sigmas)
        if "negative_prompt" in given and self.negative_prompt:
            message = "no effect on this model, whose negative prompt is always empty"
            warnings = (*warnings, ParamWarning("negative_prompt", message))
        return params, warnings

    @property
    def branches(self) -> int:
        """2 with classifier-free guidance, otherwise 1."""
        return 2 if self.guidance_scale > 1 else 1
