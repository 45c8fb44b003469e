"""Sampling parameters of LTX-Video, following Diffusers 0.42's LTX pipelines."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

from common.artifacts import Canvas, Prompt, Sampling
from common.checkpoint import Checkpoint
from common.errors import InvalidInput
from configs.models.vaes.ltx_video import LTXVideoVAEConfig
from configs.sample.base import ImageRoles, ParamWarning, parameter, warnings_without_effect
from configs.sample.frame_rate import with_conditioning_frame_rate
from configs.sample.grid import check_multiples
from configs.sample.shift_terminal import check_stretched
from configs.sample.video import VideoSamplingParams

_SIZE_MULTIPLE = 32


@dataclass(frozen=True, kw_only=True)
class LTXVideoSamplingParams(VideoSamplingParams):
    """LTX-Video, text to video. guidance_scale above 1 enables classifier-free guidance.

    An unset negative prompt is empty. Parameters with the prefix decode_ are for models whose decoder removes noise
    (0.9.5).
    """

    height: int = 512
    width: int = 704
    num_frames: int = parameter("Number of frames; one more than a multiple of 8.", 161, minimum=1, maximum=4089)
    frame_rate: float = 25.0
    num_inference_steps: int = 50
    guidance_scale: float = 3.0
    guidance_rescale: float = parameter(
        "Fraction of the guided prediction rescaled to the unguided standard deviation.", 0.0, minimum=0.0, maximum=1.0
    )
    decode_timestep: float = parameter(
        "Timestep for the decoder: noise level of its input, 0 to 1 (pure noise).", 0.0, minimum=0.0, maximum=1.0
    )
    decode_noise_scale: float | None = parameter(
        "Fraction of noise mixed into the latents before decoding; if unset, decode_timestep is used.",
        None,
        minimum=0.0,
        maximum=1.0,
    )
    max_sequence_length: int = parameter("Maximum number of prompt tokens for T5.", 128, minimum=1, maximum=512)

    @property
    def branches(self) -> int:
        """2 with classifier-free guidance, otherwise 1."""
        return 2 if self.guidance_scale > 1 else 1

    def artifacts(self) -> dict[str, Prompt | Canvas | Sampling]:
        """Add the frame rate for conditioning."""
        return with_conditioning_frame_rate(super().artifacts(), self.frame_rate)

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Check that sizes are multiples of 32, and round frames down to whole latent frames."""
        vae = LTXVideoVAEConfig.from_dict("vae", checkpoint.module_config("vae"))
        check_multiples({"height": self.height, "width": self.width}, math.lcm(_SIZE_MULTIPLE, vae.spatial_factor))
        check_stretched(checkpoint, self.num_inference_steps)
        params, warnings = self.with_whole_latent_frames(vae)
        return params, (*warnings, *warnings_without_effect(self._without_effect(vae), given))

    def _without_effect(self, vae: LTXVideoVAEConfig) -> dict[str, str]:
        """Parameters without effect in this request, each with the reason."""
        idle: dict[str, str] = {}
        if self.guidance_scale <= 1:
            idle |= dict.fromkeys(("negative_prompt", "guidance_rescale"), "unless guidance_scale is above 1")
        if not vae.removes_noise:
            idle |= dict.fromkeys(
                ("decode_timestep", "decode_noise_scale"), "on this model, whose decoder removes no noise"
            )
        return idle


@dataclass(frozen=True, kw_only=True)
class LTXVideoImageToVideoSamplingParams(LTXVideoSamplingParams):
    """LTX-Video, text and image to video. The image, stretched to height x width, is the first frame."""

    @classmethod
    def image_roles(cls, checkpoint: Checkpoint) -> ImageRoles:
        """One required image."""
        del checkpoint
        return ImageRoles(required=("image",))

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Validate as for text to video, and check that there are frames after the image."""
        params, warnings = super().round_and_validate(checkpoint, given)
        if params.num_frames == 1:
            vae = LTXVideoVAEConfig.from_dict("vae", checkpoint.module_config("vae"))
            message = f"num_frames: {self.num_frames} leaves no frame after the image"
            raise InvalidInput(f"{message}; {vae.temporal_factor + 1} or more works", field="num_frames")
        return params, warnings
