"""Sampling parameters of FLUX.1, as Diffusers 0.42's FluxPipeline takes and rounds them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

from common.artifacts import ParamValue
from common.checkpoint import Checkpoint
from common.errors import CheckpointError, InvalidInput
from configs.sample.base import ParamWarning, SamplingParams, parameter

_DEFAULT_LATENT_SIZE = 128
_PATCH = 2
_SMALLEST_SIGMA = 1e-6


@dataclass(frozen=True, kw_only=True)
class FluxSamplingParams(SamplingParams):
    """FLUX.1-dev, FLUX.1-schnell and their fine-tunes.

    guidance_scale feeds an embedding of guidance-distilled models; true_cfg_scale above 1 with a negative prompt is
    classifier-free guidance. Sizes are multiples of what the VAE and the 2x2 packing reduce together.
    """

    num_inference_steps: int = 28
    guidance_scale: float = 3.5
    prompt_2: str | None = parameter("Text for the T5 encoder; unset means prompt.", None)
    negative_prompt_2: str | None = parameter("Negative text for T5; unset means negative_prompt.", None)
    true_cfg_scale: float = parameter(
        "Classifier-free guidance, on above 1 with a negative prompt.", 1.0, minimum=0.0, maximum=1000.0
    )
    sigmas: tuple[float, ...] = parameter(
        "Noise level of each step, highest first; sets the number of steps.", (), minimum=_SMALLEST_SIGMA, maximum=1.0
    )
    max_sequence_length: int = parameter("Tokens of the prompt that T5 reads.", 512, minimum=1, maximum=512)

    @classmethod
    def model_defaults(cls, checkpoint: Checkpoint) -> dict[str, ParamValue]:
        """The native size: 128 latents a side."""
        side = _DEFAULT_LATENT_SIZE * vae_scale_factor(checkpoint)
        return {"height": side, "width": side}

    def fitted(self, checkpoint: Checkpoint, given: Collection[str]) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Floor the size to whole patches; sigmas decide the steps; warn where a value has no effect."""
        params, warnings = self.floored_size(_PATCH * vae_scale_factor(checkpoint))
        params, more = params._with_steps_of_sigmas(given)
        return params, (*warnings, *more, *params._without_effect(checkpoint, given))

    def _with_steps_of_sigmas(self, given: Collection[str]) -> tuple[Self, tuple[ParamWarning, ...]]:
        if not self.sigmas:
            return self, ()
        for earlier, later in pairwise(self.sigmas):
            if later > earlier:
                raise InvalidInput(f"sigmas must not rise, but {later} follows {earlier}", field="sigmas")
        steps = len(self.sigmas)
        fitted = replace(self, num_inference_steps=steps)
        if "num_inference_steps" not in given or self.num_inference_steps == steps:
            return fitted, ()
        message = f"sigmas has {steps} values, so {steps} steps are taken instead of {self.num_inference_steps}"
        return fitted, (ParamWarning("num_inference_steps", message),)

    def _without_effect(self, checkpoint: Checkpoint, given: Collection[str]) -> list[ParamWarning]:
        """What the caller set and FluxPipeline passes over in silence."""
        idle: dict[str, str] = {}
        if self.negative_prompt is None:
            idle["negative_prompt_2"] = "without negative_prompt"
            if self.true_cfg_scale > 1:
                idle["true_cfg_scale"] = "without negative_prompt"
        elif self.true_cfg_scale <= 1:
            idle = dict.fromkeys(("negative_prompt", "negative_prompt_2"), "unless true_cfg_scale is above 1")
        if not checkpoint.module_config("transformer").get("guidance_embeds", False):
            idle["guidance_scale"] = "on this model, which has no guidance embedding"
        return [ParamWarning(name, f"{name} has no effect {why}") for name, why in idle.items() if name in given]


def vae_scale_factor(checkpoint: Checkpoint) -> int:
    """Pixels a side that become one latent. Raises CheckpointError where the VAE's config does not tell."""
    channels = checkpoint.module_config("vae").get("block_out_channels")
    if not isinstance(channels, list) or not channels:
        raise CheckpointError(f"{checkpoint.path / 'vae'} has no block_out_channels in its config.json")
    return 1 << (len(channels) - 1)
