"""Sampling parameters of HunyuanVideo, following Diffusers 0.42's HunyuanVideoPipeline."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

from common.checkpoint import Checkpoint
from configs.models.vaes.hunyuan_video import AutoencoderKLHunyuanVideoConfig
from configs.sample.base import ParamWarning, parameter, warnings_without_effect
from configs.sample.grid import check_multiples
from configs.sample.shift_terminal import check_stretched
from configs.sample.sigmas import SigmasSamplingParams
from configs.sample.video import VideoSamplingParams

_SIZE_MULTIPLE = 16


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoSamplingParams(VideoSamplingParams, SigmasSamplingParams):
    """HunyuanVideo, text to video. The model embeds guidance_scale.

    A true_cfg_scale above 1 with a negative prompt enables classifier-free guidance.
    """

    height: int = 720
    width: int = 1280
    num_frames: int = parameter("Number of frames; one more than a multiple of 4.", 129, minimum=1, maximum=4093)
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    true_cfg_scale: float = parameter(
        "Scale of classifier-free guidance; enabled above 1 with a negative prompt.", 1.0, minimum=0.0, maximum=1000.0
    )
    prompt_2: str | None = parameter("Prompt for the CLIP encoder; if unset, prompt is used.", None)
    negative_prompt_2: str | None = parameter(
        "Negative prompt for the CLIP encoder; if unset, negative_prompt is used.", None
    )
    max_sequence_length: int = parameter("Maximum number of prompt tokens for Llama.", 256, minimum=1, maximum=1024)

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Check that sizes are multiples of 16, round frames down to whole latent frames, and apply sigmas."""
        check_multiples({"height": self.height, "width": self.width}, _SIZE_MULTIPLE)
        params, warnings = self.with_steps_of_sigmas(given)
        check_stretched(checkpoint, params.num_inference_steps, params.sigmas)
        vae = AutoencoderKLHunyuanVideoConfig.from_dict("vae", checkpoint.module_config("vae"))
        params, more = params.with_whole_latent_frames(vae)
        return params, (*warnings, *more, *warnings_without_effect(self._without_effect(checkpoint), given))

    def _without_effect(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Parameters without effect in this request, each with the reason."""
        idle: dict[str, str] = {}
        if self.negative_prompt is None:
            idle |= {"negative_prompt_2": "without negative_prompt"}
            if self.true_cfg_scale > 1:
                idle |= {"true_cfg_scale": "without negative_prompt"}
        elif self.true_cfg_scale <= 1:
            idle |= dict.fromkeys(("negative_prompt", "negative_prompt_2"), "unless true_cfg_scale is above 1")
        if checkpoint.module_config("transformer").get("guidance_embeds") is False:
            idle |= {"guidance_scale": "on this model, which has no guidance embedding"}
        return idle

    @property
    def branches(self) -> int:
        """2 with classifier-free guidance, otherwise 1."""
        return 2 if self.true_cfg_scale > 1 and self.negative_prompt is not None else 1
