"""Sampling parameters shared by image models with packed latents."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

from common.artifacts import ParamValue
from common.checkpoint import Checkpoint
from configs.sample.base import ParamWarning, parameter, warnings_without_effect
from configs.sample.shift_terminal import check_stretched
from configs.sample.sigmas import SigmasSamplingParams

_DEFAULT_LATENT_SIZE = 128
_PATCH = 2


@dataclass(frozen=True, kw_only=True)
class PackedSamplingParams(SigmasSamplingParams):
    """Sizes are multiples of a packed 2x2 patch of latents; custom sigmas may replace the schedule.

    A true_cfg_scale above 1 with a negative prompt enables classifier-free guidance.
    """

    true_cfg_scale: float = parameter(
        "Scale of classifier-free guidance; enabled above 1 with a negative prompt.", 1.0, minimum=0.0, maximum=1000.0
    )

    @classmethod
    def pixels_per_latent(cls, checkpoint: Checkpoint) -> int:
        """Pixels along each side of a latent. Raises CheckpointError if the VAE's config lacks the entry."""
        raise TypeError(f"{cls.__name__} does not define pixels_per_latent() for the VAE of {checkpoint.name}")

    @classmethod
    def model_defaults(cls, checkpoint: Checkpoint) -> dict[str, ParamValue]:
        """The native size, 128 x 128 latents."""
        side = _DEFAULT_LATENT_SIZE * cls.pixels_per_latent(checkpoint)
        return {"height": side, "width": side}

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Round the size down to whole patches, apply sigmas, and warn about values without effect.

        Raises InvalidInput for a schedule that shift_terminal cannot stretch.
        """
        params, warnings = self.floored_size(_PATCH * self.pixels_per_latent(checkpoint))
        params, more = params.with_steps_of_sigmas(given)
        check_stretched(checkpoint, params.num_inference_steps, params.sigmas)
        return params, (*warnings, *more, *warnings_without_effect(params.without_effect(checkpoint), given))

    @property
    def branches(self) -> int:
        """2 with classifier-free guidance, otherwise 1."""
        return 2 if self.true_cfg_scale > 1 and self.negative_prompt is not None else 1

    def without_effect(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Parameters that the Diffusers pipeline ignores silently, each with the reason for a warning."""
        del checkpoint
        if self.negative_prompt is None:
            return {"true_cfg_scale": "without negative_prompt"} if self.true_cfg_scale > 1 else {}
        return {} if self.true_cfg_scale > 1 else {"negative_prompt": "unless true_cfg_scale is above 1"}
