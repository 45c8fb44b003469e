"""Sampling parameters of FLUX.2 klein, as Diffusers 0.42's Flux2KleinPipeline takes and rounds them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Self

from common.artifacts import ParamValue
from common.checkpoint import Checkpoint
from configs.models.fields import ConfigFields
from configs.sample.base import ParamWarning, parameter
from configs.sample.flux import vae_scale_factor
from configs.sample.sigmas import SigmasSamplingParams
from configs.sample.terminal import check_stretched

_DEFAULT_LATENT_SIZE = 128
_PATCH = 2


@dataclass(frozen=True, kw_only=True)
class Flux2KleinSamplingParams(SigmasSamplingParams):
    """FLUX.2 klein, distilled or not. guidance_scale above 1 is classifier-free guidance of models not distilled.

    The negative prompt is always empty. shift_steps keeps the num_inference_steps that sigmas replace: the shift of the
    noise levels depends on it.
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
        """The native size, 128 latents a side; a distilled model has no guidance."""
        side = _DEFAULT_LATENT_SIZE * vae_scale_factor(checkpoint)
        size: dict[str, ParamValue] = {"height": side, "width": side}
        return {**size, "guidance_scale": 1.0} if _is_distilled(checkpoint) else size

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
            idle.append(ParamWarning("negative_prompt", "negative_prompt has no effect: this model uses an empty one"))
        if params.guidance_scale > 1 and _is_distilled(checkpoint):
            params = replace(params, guidance_scale=1.0)
            idle.append(ParamWarning("guidance_scale", "guidance_scale has no effect: this model is distilled"))
        return params, (*warnings, *more, *idle)

    @property
    def branches(self) -> int:
        """Two with classifier-free guidance."""
        return 2 if self.guidance_scale > 1 else 1


def _is_distilled(checkpoint: Checkpoint) -> bool:
    return ConfigFields("model_index", checkpoint.index).flag("is_distilled", False)
