"""Sampling parameters of Z-Image and Z-Image-Turbo, as Diffusers 0.42's ZImagePipeline takes and checks them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

from common.artifacts import ParamValue
from common.checkpoint import Checkpoint
from common.image_header import ImageHeader
from configs.sample.base import ParamWarning, parameter
from configs.sample.flux import vae_scale_factor
from configs.sample.grid import check_multiples
from configs.sample.sigmas import SigmasSamplingParams
from configs.sample.terminal import check_stretched

_PATCH = 2
_NORMALIZATION = "cfg_normalization"


@dataclass(frozen=True, kw_only=True)
class ZImageSamplingParams(SigmasSamplingParams):
    """Z-Image, its Turbo form and their fine-tunes. Any guidance_scale above 0 is classifier-free guidance.

    An unset negative prompt is empty.
    """

    height: int = 1024
    width: int = 1024
    num_inference_steps: int = 50
    guidance_scale: float = parameter(
        "Classifier-free guidance, on above 0: the difference to the negative prediction is added so many times.",
        5.0,
        minimum=0.0,
        maximum=1000.0,
    )
    cfg_normalization: float = parameter(
        "Norm of a guided prediction in multiples of the positive one's, at most; 0: any norm. true means 1.",
        0.0,
        minimum=0.0,
        maximum=1000.0,
    )
    cfg_truncation: float = parameter(
        "Steps whose noise level is below 1 minus this run without guidance; from 1 on all steps have it.",
        1.0,
        minimum=0.0,
        maximum=1000.0,
    )
    max_sequence_length: int = parameter(
        "Tokens of the prompt that the text encoder reads, its template's 8 included.", 512, minimum=1, maximum=960
    )

    @classmethod
    def build(
        cls,
        given: Mapping[str, ParamValue],
        checkpoint: Checkpoint,
        images: Mapping[str, ImageHeader] = MappingProxyType({}),
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """As for every family; cfg_normalization may also be a truth value, as in Diffusers."""
        if isinstance(given.get(_NORMALIZATION), bool):
            given = {**given, _NORMALIZATION: float(bool(given[_NORMALIZATION]))}
        return super().build(given, checkpoint, images)

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Refuse sizes that are not made of whole patches; sigmas decide the steps."""
        check_multiples({"height": self.height, "width": self.width}, _PATCH * vae_scale_factor(checkpoint))
        params, warnings = self.with_steps_of_sigmas(given)
        check_stretched(checkpoint, params.num_inference_steps, params.sigmas)
        if self.guidance_scale > 0:
            return params, warnings
        idle = ("negative_prompt", _NORMALIZATION, "cfg_truncation")
        more = [ParamWarning(name, f"{name} has no effect without guidance_scale") for name in idle if name in given]
        return params, (*warnings, *more)

    @property
    def branches(self) -> int:
        """Two with classifier-free guidance."""
        return 2 if self.guidance_scale > 0 else 1
