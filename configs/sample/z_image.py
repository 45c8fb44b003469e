"""Sampling parameters of Z-Image and Z-Image-Turbo, following Diffusers 0.42's ZImagePipeline."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

from common.artifacts import ParamValue
from common.checkpoint import Checkpoint
from common.image_header import ImageHeader
from configs.sample.base import ParamWarning, parameter, warnings_without_effect
from configs.sample.flux import vae_scale_factor
from configs.sample.grid import check_multiples
from configs.sample.shift_terminal import check_stretched
from configs.sample.sigmas import SigmasSamplingParams

_PATCH = 2
_NORMALIZATION = "cfg_normalization"


@dataclass(frozen=True, kw_only=True)
class ZImageSamplingParams(SigmasSamplingParams):
    """Z-Image, Z-Image-Turbo and their fine-tunes. guidance_scale above 0 enables classifier-free guidance.

    An unset negative prompt is empty.
    """

    height: int = 1024
    width: int = 1024
    num_inference_steps: int = 50
    guidance_scale: float = parameter(
        "Scale of classifier-free guidance, relative to the positive prediction; enabled above 0.",
        5.0,
        minimum=0.0,
        maximum=1000.0,
    )
    cfg_normalization: float = parameter(
        "Maximum ratio of the norms of guided and positive prediction; 0: unlimited; true: 1.",
        0.0,
        minimum=0.0,
        maximum=1000.0,
    )
    cfg_truncation: float = parameter(
        "Guidance is off at noise levels below 1 minus this value; at 1 or above, all steps have guidance.",
        1.0,
        minimum=0.0,
        maximum=1000.0,
    )
    max_sequence_length: int = parameter(
        "Maximum number of prompt tokens for the text encoder, including 8 of its template.",
        512,
        minimum=1,
        maximum=960,
    )

    @classmethod
    def build(
        cls,
        given: Mapping[str, ParamValue],
        checkpoint: Checkpoint,
        images: Mapping[str, ImageHeader] = MappingProxyType({}),
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Build as SamplingParams.build() does; cfg_normalization may also be a boolean, as in Diffusers."""
        if isinstance(given.get(_NORMALIZATION), bool):
            given = {**given, _NORMALIZATION: float(bool(given[_NORMALIZATION]))}
        return super().build(given, checkpoint, images)

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Check that the size is a multiple of the patch size, and apply sigmas."""
        check_multiples({"height": self.height, "width": self.width}, _PATCH * vae_scale_factor(checkpoint))
        params, warnings = self.with_steps_of_sigmas(given)
        check_stretched(checkpoint, params.num_inference_steps, params.sigmas)
        if self.guidance_scale > 0:
            return params, warnings
        idle = ("negative_prompt", _NORMALIZATION, "cfg_truncation")
        return params, (*warnings, *warnings_without_effect(dict.fromkeys(idle, "without guidance_scale"), given))

    @property
    def branches(self) -> int:
        """2 with classifier-free guidance, otherwise 1."""
        return 2 if self.guidance_scale > 0 else 1
