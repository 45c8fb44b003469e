"""Sampling parameters of Wan 2.1, as Diffusers 0.42's WanPipeline and WanImageToVideoPipeline take and round them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from common.artifacts import ParamValue
from common.checkpoint import Checkpoint
from common.errors import CheckpointError, InvalidInput
from configs.sample.base import ImageRoles, ParamWarning, SamplingParams, parameter
from configs.sample.terminal import check_stretched

_SIZE_MULTIPLE = 16
_PATCH = (1, 2, 2)


@dataclass(frozen=True, kw_only=True)
class WanSamplingParams(SamplingParams):
    """Wan 2.1 text to video. guidance_scale above 1 is classifier-free guidance; an unset negative prompt is empty.

    A video has 4k + 1 frames. max_total_pixels counts those of all frames of all outputs.
    """

    output_formats: ClassVar[tuple[str, ...]] = ("mp4", "safetensors")
    max_total_pixels: ClassVar[int] = 2**28
    supported_version: ClassVar[str] = "Wan 2.1"
    other_versions: ClassVar[Mapping[str, str]] = {
        "boundary_ratio": "two transformers",
        "expand_timesteps": "a timestep for each token",
    }
    """Entries of model_index.json that Wan models of other versions have, each with its meaning."""

    height: int = 480
    width: int = 832
    num_frames: int = parameter("Frames of the video; one more than a multiple of 4.", 81, minimum=1, maximum=4093)
    frame_rate: float = parameter("Frames a second that the video is shown with.", 16.0, minimum=1.0, maximum=240.0)
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    max_sequence_length: int = parameter("Tokens of the prompt that UMT5 reads.", 512, minimum=1, maximum=512)

    @property
    def branches(self) -> int:
        """Two with classifier-free guidance."""
        return 2 if self.guidance_scale > 1 else 1

    @classmethod
    def model_defaults(cls, checkpoint: Checkpoint) -> dict[str, ParamValue]:
        """None of its own. Raises CheckpointError for the Wan models of other versions."""
        for name, meaning in cls.other_versions.items():
            if checkpoint.index.get(name):
                message = f"{checkpoint.name} is Wan 2.2 with {meaning} ({name})"
                raise CheckpointError(f"{message}; supported is {cls.supported_version}")
        return {}

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Refuse sizes that are no multiples of 16; round the frames, and the size to whole patches."""
        del given
        for name, size in (("height", self.height), ("width", self.width)):
            if size % _SIZE_MULTIPLE:
                lower = size // _SIZE_MULTIPLE * _SIZE_MULTIPLE
                right = f"{lower} or {lower + _SIZE_MULTIPLE}" if lower else f"{_SIZE_MULTIPLE}"
                raise InvalidInput(f"{name} must be a multiple of 16, such as {right}, but is {size}", field=name)
        self._check_steps(checkpoint)
        params, warnings = self._with_whole_latent_frames(checkpoint)
        vae, transformer = checkpoint.module_config("vae"), checkpoint.module_config("transformer")
        patch = (transformer.get("patch_size") or _PATCH)[1]
        params, more = params.floored_size(_factor(vae, "scale_factor_spatial", 8) * int(patch))
        return params, (*warnings, *more)

    def _check_steps(self, checkpoint: Checkpoint) -> None:
        """Refuse steps that the scheduler cannot lay out. Raises InvalidInput."""
        check_stretched(checkpoint, self.num_inference_steps)

    def _with_whole_latent_frames(self, checkpoint: Checkpoint) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Frames as Diffusers rounds them: 4k + 1 stays, anything else becomes (n // 4) * 4 + 1."""
        factor = temporal_factor(checkpoint)
        asked = self.num_frames
        if asked % factor == 1:
            return self, ()
        frames = asked // factor * factor + 1
        if frames == asked:
            return self, ()
        message = f"num_frames {asked} is not one more than a multiple of {factor}; {frames} is used instead"
        return replace(self, num_frames=frames), (ParamWarning("num_frames", message),)

    @property
    def extent(self) -> dict[str, int]:
        """Frames count too."""
        return {**super().extent, "num_frames": self.num_frames}


@dataclass(frozen=True, kw_only=True)
class WanImageToVideoSamplingParams(WanSamplingParams):
    """Wan 2.1 image to video. The picture is stretched to height x width; the video begins with it.

    Models for first and last frame take both "image" and "last_image".
    """

    @classmethod
    def image_roles(cls, checkpoint: Checkpoint) -> ImageRoles:
        """Models that tell the tokens of two pictures apart by position need both."""
        if checkpoint.module_config("transformer").get("pos_embed_seq_len"):
            return ImageRoles(required=("image", "last_image"))
        return ImageRoles(required=("image",))

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """As for text alone; a first and a last frame are two."""
        params, warnings = super().round_and_validate(checkpoint, given)
        if params.num_frames == 1 and "last_image" in self.image_roles(checkpoint).required:
            message = f"num_frames must be at least 5 with a last_image, but is {self.num_frames}"
            raise InvalidInput(message, field="num_frames")
        return params, warnings


def temporal_factor(checkpoint: Checkpoint) -> int:
    """Frames of a latent frame, but the first. Raises CheckpointError."""
    return _factor(checkpoint.module_config("vae"), "scale_factor_temporal", 4)


def _factor(vae: Mapping[str, Any], name: str, default: int) -> int:
    value = vae.get(name) or default
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"vae/config.json: {name} must be a whole number of at least 1, but is {value!r}")
    return value
