"""Sampling parameters of LTX-Video, as Diffusers 0.42's LTXPipeline and LTXImageToVideoPipeline take and check them."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from common.artifacts import Canvas, Prompt, Sampling
from common.checkpoint import Checkpoint
from common.errors import InvalidInput
from configs.models.vaes.ltx_video import LTXVideoVAEConfig
from configs.sample.base import ImageRoles, ParamWarning, SamplingParams, parameter
from configs.sample.frame_rate import with_conditioning_frame_rate
from configs.sample.grid import check_multiples
from configs.sample.terminal import check_stretched

_SIZE_MULTIPLE = 32


@dataclass(frozen=True, kw_only=True)
class LTXVideoSamplingParams(SamplingParams):
    """LTX-Video from text. guidance_scale above 1 is classifier-free guidance; an unset negative prompt is empty.

    The parameters that begin with decode_ are for models whose decoder removes noise (0.9.5). max_total_pixels counts
    those of all frames of all outputs.
    """

    output_formats: ClassVar[tuple[str, ...]] = ("mp4", "safetensors")
    max_total_pixels: ClassVar[int] = 2**28

    height: int = 512
    width: int = 704
    num_frames: int = parameter("Frames of the video; one more than a multiple of 8.", 161, minimum=1, maximum=4089)
    frame_rate: float = parameter("Frames a second.", 25.0, minimum=1.0, maximum=240.0)
    num_inference_steps: int = 50
    guidance_scale: float = 3.0
    guidance_rescale: float = parameter(
        "Share of the guided prediction that gets the contrast of the unguided one.", 0.0, minimum=0.0, maximum=1.0
    )
    decode_timestep: float = parameter(
        "Noise level, of 1 for noise alone, that the decoder expects.", 0.0, minimum=0.0, maximum=1.0
    )
    decode_noise_scale: float | None = parameter(
        "Share of noise that latents get before they are decoded; unset means decode_timestep.",
        None,
        minimum=0.0,
        maximum=1.0,
    )
    max_sequence_length: int = parameter("Tokens of the prompt that T5 reads.", 128, minimum=1, maximum=512)

    @property
    def branches(self) -> int:
        """Two with classifier-free guidance."""
        return 2 if self.guidance_scale > 1 else 1

    @property
    def extent(self) -> dict[str, int]:
        """Frames count too."""
        return {**super().extent, "num_frames": self.num_frames}

    def artifacts(self) -> dict[str, Prompt | Canvas | Sampling]:
        """The denoiser gets the frame rate, too."""
        return with_conditioning_frame_rate(super().artifacts(), self.frame_rate)

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Refuse sizes off the grid of 32 pixels; round frames down to whole latent frames."""
        vae = LTXVideoVAEConfig.from_dict("vae", checkpoint.module_config("vae"))
        check_multiples({"height": self.height, "width": self.width}, math.lcm(_SIZE_MULTIPLE, vae.spatial_factor))
        check_stretched(checkpoint, self.num_inference_steps)
        frames, warnings = vae.whole_frames(self.num_frames), []
        if frames != self.num_frames:
            rule = f"is not one more than a multiple of {vae.temporal_factor}"
            message = f"num_frames {self.num_frames} {rule}; {frames} is used instead"
            warnings.append(ParamWarning("num_frames", message))
        warnings += [
            ParamWarning(name, f"{name} has no effect {why}")
            for name, why in self._without_effect(vae).items()
            if name in given
        ]
        return replace(self, num_frames=frames), tuple(warnings)

    def _without_effect(self, vae: LTXVideoVAEConfig) -> dict[str, str]:
        """Parameters that change nothing in this request, each with the circumstance."""
        idle: dict[str, str] = {}
        if self.guidance_scale <= 1:
            idle |= dict.fromkeys(("negative_prompt", "guidance_rescale"), "unless guidance_scale is above 1")
        if not vae.removes_noise:
            idle |= dict.fromkeys(("decode_timestep", "decode_noise_scale"), "on this model, which decodes no noise")
        return idle


@dataclass(frozen=True, kw_only=True)
class LTXVideoImageToVideoSamplingParams(LTXVideoSamplingParams):
    """LTX-Video from text and an image, resized to height x width without its aspect: the video's first frame."""

    @classmethod
    def image_roles(cls, checkpoint: Checkpoint) -> ImageRoles:
        """One image."""
        del checkpoint
        return ImageRoles(required=("image",))

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """As for text alone; the image is the first frame, so that there must be others."""
        params, warnings = super().round_and_validate(checkpoint, given)
        if params.num_frames == 1:
            vae = LTXVideoVAEConfig.from_dict("vae", checkpoint.module_config("vae"))
            message = f"num_frames: {self.num_frames} leaves no frame after the image"
            raise InvalidInput(f"{message}; {vae.temporal_factor + 1} or more works", field="num_frames")
        return params, warnings
