"""Sampling parameters of LTX-2, following Diffusers 0.42's LTX2 pipelines."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Self

from common.artifacts import Canvas, Prompt, Sampling
from common.checkpoint import Checkpoint
from common.errors import InvalidInput
from configs.models.dits.ltx2 import LTX2TransformerConfig
from configs.models.ltx2_connectors import LTX2ConnectorsConfig
from configs.models.vaes.ltx2 import LTX2AudioVAEConfig, LTX2VideoVAEConfig
from configs.sample.base import ImageRoles, ParamWarning, parameter
from configs.sample.frame_rate import with_conditioning_frame_rate
from configs.sample.shift_terminal import check_stretched
from configs.sample.sigmas import SigmasSamplingParams
from configs.sample.video import VideoSamplingParams

_MAX_SCALE = 1000.0
_STG_PARAMETERS = ("stg_scale", "audio_stg_scale", "spatio_temporal_guidance_blocks")


@dataclass(frozen=True, kw_only=True)
class LTX2SamplingParams(VideoSamplingParams, SigmasSamplingParams):
    """LTX-2, text to a video with audio. Parameters with the prefix audio_ are for the audio.

    There are three kinds of guidance, each with its own prediction: by a negative prompt (guidance_scale above 1), by
    skipped self-attention (stg_scale above 0), and by omitted cross-modal attention (modality_scale above 1).
    Defaults are those of Diffusers' call, for LTX-2.3.
    """

    prompt: str = parameter("Text prompt for video and audio.")
    height: int = 512
    width: int = 768
    num_frames: int = parameter("Number of frames; one more than a multiple of 8.", 121, minimum=1, maximum=4089)
    motion_speed: float = parameter(
        "Speed of motion at the same frame rate; below 1 is slow motion.", 1.0, minimum=0.01, maximum=100.0
    )
    num_inference_steps: int = 30
    guidance_scale: float = 3.0
    stg_scale: float = parameter(
        "Scale of spatio-temporal guidance; enabled above 0.", 1.0, minimum=0.0, maximum=_MAX_SCALE
    )
    modality_scale: float = parameter(
        "Scale of modality guidance; enabled above 1.", 3.0, minimum=0.0, maximum=_MAX_SCALE
    )
    guidance_rescale: float = parameter(
        "Fraction of the guided video rescaled to the unguided standard deviation.", 0.7, minimum=0.0, maximum=1.0
    )
    audio_guidance_scale: float = parameter(
        "guidance_scale of the audio; 0: the video's value.", 7.0, minimum=0.0, maximum=_MAX_SCALE
    )
    audio_stg_scale: float = parameter(
        "stg_scale of the audio; 0: the video's value.", 1.0, minimum=0.0, maximum=_MAX_SCALE
    )
    audio_modality_scale: float = parameter(
        "modality_scale of the audio; 0: the video's value.", 3.0, minimum=0.0, maximum=_MAX_SCALE
    )
    audio_guidance_rescale: float = parameter(
        "guidance_rescale of the audio; 0: the video's value.", 0.7, minimum=0.0, maximum=1.0
    )
    spatio_temporal_guidance_blocks: tuple[float, ...] = parameter(
        "Indices of blocks whose self-attention is skipped for spatio-temporal guidance.",
        (28.0,),
        minimum=0,
        maximum=1000,
    )
    use_cross_timestep: bool = parameter(
        "Whether the input image's cross-modal attention uses the audio's timestep: true for LTX-2.3, false for 2.0.",
        True,
    )
    max_sequence_length: int = parameter("Maximum number of prompt tokens for Gemma.", 1024, minimum=1, maximum=4096)

    @property
    def branches(self) -> int:
        """1, plus 1 for each enabled kind of guidance."""
        is_on = (
            max(self.guidance_scale, self.audio_guidance_scale) > 1,
            max(self.stg_scale, self.audio_stg_scale) > 0,
            max(self.modality_scale, self.audio_modality_scale) > 1,
        )
        return 1 + sum(is_on)

    def artifacts(self) -> dict[str, Prompt | Canvas | Sampling]:
        """Add the frame rate for conditioning, which accounts for `motion_speed`."""
        return with_conditioning_frame_rate(super().artifacts(), self.frame_rate / self.motion_speed)

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Check values against the modules, replace audio scales of 0, and apply sigmas."""
        vae = LTX2VideoVAEConfig.from_dict("vae", checkpoint.module_config("vae"))
        self._check_size(vae)
        self._check_audio(LTX2AudioVAEConfig.from_dict("audio_vae", checkpoint.module_config("audio_vae")))
        self._check_text(LTX2ConnectorsConfig.from_dict("connectors", checkpoint.module_config("connectors")))
        params, warnings = self._with_audio_scales(given)
        params, more = params.with_steps_of_sigmas(given)
        check_stretched(checkpoint, params.num_inference_steps, params.sigmas)
        transformer = LTX2TransformerConfig.from_dict("transformer", checkpoint.module_config("transformer"))
        skipping = params._skipping_warnings(transformer, given)
        return params, (*warnings, *more, *skipping, *self._frame_warnings(vae))

    def _check_size(self, vae: LTX2VideoVAEConfig) -> None:
        side, minimum = vae.spatial_factor, vae.spatial_factor * vae.min_latents
        for name, size in (("height", self.height), ("width", self.width)):
            if size % side or size < minimum:
                lower = max(size // side * side, minimum)
                message = f"{name}: {size} is not a multiple of {side} of at least {minimum}"
                raise InvalidInput(f"{message}; {lower} or {lower + side} works", field=name)

    def _check_audio(self, audio_vae: LTX2AudioVAEConfig) -> None:
        """Check that the audio, which is as long as the video, has at least one latent. Raises InvalidInput."""
        if audio_vae.latent_length(self.num_frames, self.frame_rate):
            return
        seconds = self.num_frames / self.frame_rate
        needed = 1
        while not audio_vae.latent_length(needed, self.frame_rate):
            needed += 1
        raise InvalidInput(
            f"num_frames: {self.num_frames} at frame_rate {self.frame_rate} is {seconds:.4f} seconds, which is too "
            f"short for audio; at least {needed} frames or a lower frame_rate work",
            field="num_frames",
        )

    def _check_text(self, connectors: LTX2ConnectorsConfig) -> None:
        multiple = connectors.registers or 1
        if self.max_sequence_length % multiple:
            lower = max(self.max_sequence_length // multiple * multiple, multiple)
            message = f"max_sequence_length: {self.max_sequence_length} is not a multiple of {multiple}"
            raise InvalidInput(f"{message}; {lower} works", field="max_sequence_length")

    def _with_audio_scales(self, given: Collection[str]) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Replace audio values of 0 with the video's values, as in Diffusers."""
        pairs = {
            "audio_guidance_scale": (self.audio_guidance_scale, self.guidance_scale),
            "audio_stg_scale": (self.audio_stg_scale, self.stg_scale),
            "audio_modality_scale": (self.audio_modality_scale, self.modality_scale),
            "audio_guidance_rescale": (self.audio_guidance_rescale, self.guidance_rescale),
        }
        changed = {name: video for name, (audio, video) in pairs.items() if not audio and video}
        warnings = [
            ParamWarning(name, f"0 means the video's value; {video} is used")
            for name, video in changed.items()
            if name in given
        ]
        values: dict[str, Any] = dict(changed)
        return replace(self, **values), tuple(warnings)

    def _skipping_warnings(
        self, transformer: LTX2TransformerConfig, given: Collection[str]
    ) -> tuple[ParamWarning, ...]:
        """Warn if spatio-temporal guidance is enabled without effect.

        Raises InvalidInput for invalid block indices, and for enabled guidance without blocks.
        """
        name, blocks = "spatio_temporal_guidance_blocks", self.spatio_temporal_guidance_blocks
        if odd := [block for block in blocks if block != int(block)]:
            raise InvalidInput(f"{name}: {odd[0]} is not the index of a block; whole numbers work", field=name)
        if max(self.stg_scale, self.audio_stg_scale) <= 0:
            return ()
        if not blocks:
            message = f"{name}: an empty list is not allowed with stg_scale or audio_stg_scale above 0"
            raise InvalidInput(f"{message}; blocks from 0 to {transformer.num_layers - 1} work", field=name)
        reason = "spatio_temporal_guidance_blocks contains no block of this model"
        if not transformer.skips_attention:
            reason = "this model cannot skip self-attention (perturbed_attn)"
        elif any(block < transformer.num_layers for block in blocks):
            return ()
        asked = [each for each in _STG_PARAMETERS if each in given]
        return tuple(ParamWarning(each, f"no effect, as {reason}") for each in asked[:1])

    def _frame_warnings(self, vae: LTX2VideoVAEConfig) -> tuple[ParamWarning, ...]:
        frames = vae.whole_frames(self.num_frames)
        if frames == self.num_frames:
            return ()
        message = f"{self.num_frames} is not one more than a multiple of {vae.temporal_factor}"
        return (ParamWarning("num_frames", f"{message}; the video has {frames} frames, and the audio is longer"),)


@dataclass(frozen=True, kw_only=True)
class LTX2ImageToVideoSamplingParams(LTX2SamplingParams):
    """LTX-2, text and image to video. The image, stretched to height x width, is the first frame."""

    image_crf: int = parameter(
        "H.264 constant rate factor to compress the image, as training frames were; 0: no compression.",
        33,
        minimum=0,
        maximum=51,
    )

    @classmethod
    def image_roles(cls, checkpoint: Checkpoint) -> ImageRoles:
        """One required image."""
        del checkpoint
        return ImageRoles(required=("image",))
