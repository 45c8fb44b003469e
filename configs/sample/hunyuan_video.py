"""Sampling parameters of HunyuanVideo, as Diffusers 0.42's HunyuanVideoPipeline takes and checks them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from common.checkpoint import Checkpoint
from configs.models.vaes.hunyuan_video import AutoencoderKLHunyuanVideoConfig
from configs.sample.base import ParamWarning, parameter
from configs.sample.grid import check_multiples
from configs.sample.sigmas import SigmasSamplingParams
from configs.sample.terminal import check_stretched

_SIZE_MULTIPLE = 16


@dataclass(frozen=True, kw_only=True)
class HunyuanVideoSamplingParams(SigmasSamplingParams):
    """HunyuanVideo from text. guidance_scale feeds an embedding.

    true_cfg_scale above 1 with a negative prompt is classifier-free guidance. max_total_pixels counts those of all
    frames of all outputs.
    """

    output_formats: ClassVar[tuple[str, ...]] = ("mp4", "safetensors")
    max_total_pixels: ClassVar[int] = 2**28

    height: int = 720
    width: int = 1280
    num_frames: int = parameter("Frames of the video; one more than a multiple of 4.", 129, minimum=1, maximum=4093)
    frame_rate: float = parameter("Frames a second that the video is shown with.", 24.0, minimum=1.0, maximum=240.0)
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    true_cfg_scale: float = parameter(
        "Classifier-free guidance, on above 1 with a negative prompt.", 1.0, minimum=0.0, maximum=1000.0
    )
    prompt_2: str | None = parameter("Text for the CLIP encoder; unset means prompt.", None)
    negative_prompt_2: str | None = parameter("Negative text for CLIP; unset means negative_prompt.", None)
    max_sequence_length: int = parameter("Tokens of the prompt that Llama reads.", 256, minimum=1, maximum=1024)

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Refuse sizes that are no multiples of 16; round frames down to whole latent frames; sigmas decide steps."""
        check_multiples({"height": self.height, "width": self.width}, _SIZE_MULTIPLE)
        params, warnings = self.with_steps_of_sigmas(given)
        check_stretched(checkpoint, params.num_inference_steps, params.sigmas)
        vae = AutoencoderKLHunyuanVideoConfig.from_dict("vae", checkpoint.module_config("vae"))
        frames = vae.whole_frames(self.num_frames)
        if frames != self.num_frames:
            rule = f"is not one more than a multiple of {vae.temporal_factor}"
            message = f"num_frames {self.num_frames} {rule}; {frames} is used instead"
            warnings = (*warnings, ParamWarning("num_frames", message))
        idle = [
            ParamWarning(name, f"{name} has no effect {why}")
            for name, why in self._without_effect(checkpoint).items()
            if name in given
        ]
        return replace(params, num_frames=frames), (*warnings, *idle)

    def _without_effect(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Parameters that change nothing in this request, each with the circumstance."""
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
        """Two with classifier-free guidance."""
        return 2 if self.true_cfg_scale > 1 and self.negative_prompt is not None else 1

    @property
    def extent(self) -> dict[str, int]:
        """Frames count too."""
        return {**super().extent, "num_frames": self.num_frames}
