"""Sampling parameters that image models with packed latents share."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

from common.artifacts import ParamValue
from common.checkpoint import Checkpoint
from configs.sample.base import ParamWarning, parameter
from configs.sample.sigmas import SigmasSamplingParams
from configs.sample.terminal import check_stretched

_DEFAULT_LATENT_SIZE = 128
_PATCH = 2


@dataclass(frozen=True, kw_only=True)
class PackedSamplingParams(SigmasSamplingParams):
    """Sizes are multiples of what VAE and 2x2 packing reduce together; sigmas may replace the even spacing of steps.

    true_cfg_scale above 1 with a negative prompt is classifier-free guidance.
    """

    true_cfg_scale: float = parameter(
        "Classifier-free guidance, on above 1 with a negative prompt.", 1.0, minimum=0.0, maximum=1000.0
    )

    @classmethod
    def pixels_per_latent(cls, checkpoint: Checkpoint) -> int:
        """Pixels a side that become one latent. Raises CheckpointError where the VAE's config does not tell."""
        raise TypeError(f"{cls.__name__} does not know the VAE of {checkpoint.name}")

    @classmethod
    def model_defaults(cls, checkpoint: Checkpoint) -> dict[str, ParamValue]:
        """The native size: 128 latents a side."""
        side = _DEFAULT_LATENT_SIZE * cls.pixels_per_latent(checkpoint)
        return {"height": side, "width": side}

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Floor the size to whole patches; sigmas decide the steps; warn where a value has no effect.

        Raises InvalidInput for a schedule that shift_terminal cannot stretch.
        """
        params, warnings = self.floored_size(_PATCH * self.pixels_per_latent(checkpoint))
        params, more = params.with_steps_of_sigmas(given)
        check_stretched(checkpoint, params.num_inference_steps, params.sigmas)
        idle = params.without_effect(checkpoint)
        idle_warnings = tuple(
            ParamWarning(name, f"{name} has no effect {why}") for name, why in idle.items() if name in given
        )
        return params, (*warnings, *more, *idle_warnings)

    @property
    def branches(self) -> int:
        """Two with classifier-free guidance."""
        return 2 if self.true_cfg_scale > 1 and self.negative_prompt is not None else 1

    def without_effect(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Parameters that this model passes over in silence, each with the circumstance; a warning if they were set."""
        del checkpoint
        if self.negative_prompt is None:
            return {"true_cfg_scale": "without negative_prompt"} if self.true_cfg_scale > 1 else {}
        return {} if self.true_cfg_scale > 1 else {"negative_prompt": "unless true_cfg_scale is above 1"}
