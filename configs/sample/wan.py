"""Sampling parameters of Wan 2.1, following Diffusers 0.42's Wan pipelines."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from common.artifacts import ParamValue
from common.checkpoint import Checkpoint
from common.errors import CheckpointError, InvalidInput
from configs.sample.base import ImageRoles, ParamWarning, parameter
from configs.sample.grid import check_multiples
from configs.sample.shift_terminal import check_stretched
from configs.sample.video import VideoSamplingParams

_SIZE_MULTIPLE = 16
_PATCH = (1, 2, 2)


@dataclass(frozen=True, kw_only=True)
class WanSamplingParams(VideoSamplingParams):
    """Wan 2.1, text to video. guidance_scale above 1 enables classifier-free guidance.

    An unset negative prompt is empty. A video has 4k + 1 frames.
    """

    supported_version: ClassVar[str] = "Wan 2.1"
    other_versions: ClassVar[Mapping[str, str]] = {
        "boundary_ratio": "two transformers",
        "expand_timesteps": "a timestep for each token",
    }
    """Entries of model_index.json that identify other Wan versions, each with its meaning."""

    height: int = 480
    width: int = 832
    num_frames: int = parameter("Number of frames; one more than a multiple of 4.", 81, minimum=1, maximum=4093)
    frame_rate: float = 16.0
    num_inference_steps: int = 50
    guidance_scale: float = 5.0
    max_sequence_length: int = parameter("Maximum number of prompt tokens for UMT5.", 512, minimum=1, maximum=512)

    @property
    def branches(self) -> int:
        """2 with classifier-free guidance, otherwise 1."""
        return 2 if self.guidance_scale > 1 else 1

    @classmethod
    def model_defaults(cls, checkpoint: Checkpoint) -> dict[str, ParamValue]:
        """No defaults. Raises CheckpointError for other Wan versions."""
        for name, meaning in cls.other_versions.items():
            if checkpoint.index.get(name):
                message = f"{checkpoint.name} is Wan 2.2 with {meaning} ({name})"
                raise CheckpointError(f"{message}; this pipeline supports {cls.supported_version}")
        return {}

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Check that sizes are multiples of 16, round frames, and round the size down to whole patches."""
        del given
        check_multiples({"height": self.height, "width": self.width}, _SIZE_MULTIPLE)
        self._check_steps(checkpoint)
        params, warnings = self._with_whole_latent_frames(checkpoint)
        vae, transformer = checkpoint.module_config("vae"), checkpoint.module_config("transformer")
        patch = (transformer.get("patch_size") or _PATCH)[1]
        params, more = params.floored_size(_factor(vae, "scale_factor_spatial", 8) * int(patch))
        return params, (*warnings, *more)

    def _check_steps(self, checkpoint: Checkpoint) -> None:
        """Check the number of steps against the scheduler. Raises InvalidInput."""
        check_stretched(checkpoint, self.num_inference_steps)

    def _with_whole_latent_frames(self, checkpoint: Checkpoint) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Round frames as Diffusers does: 4k + 1 is unchanged, any other n becomes (n // 4) * 4 + 1."""
        factor = temporal_factor(checkpoint)
        asked = self.num_frames
        if asked % factor == 1:
            return self, ()
        frames = asked // factor * factor + 1
        if frames == asked:
            return self, ()
        message = f"{asked} is not one more than a multiple of {factor}; {frames} is used instead"
        return replace(self, num_frames=frames), (ParamWarning("num_frames", message),)


@dataclass(frozen=True, kw_only=True)
class WanImageToVideoSamplingParams(WanSamplingParams):
    """Wan 2.1, image to video. The image, stretched to height x width, is the first frame.

    First-and-last-frame models (FLF2V) require "image" and "last_image".
    """

    @classmethod
    def image_roles(cls, checkpoint: Checkpoint) -> ImageRoles:
        """The first frame; models with `pos_embed_seq_len` (FLF2V) also require the last frame."""
        if checkpoint.module_config("transformer").get("pos_embed_seq_len"):
            return ImageRoles(required=("image", "last_image"))
        return ImageRoles(required=("image",))

    def round_and_validate(
        self, checkpoint: Checkpoint, given: Collection[str]
    ) -> tuple[Self, tuple[ParamWarning, ...]]:
        """Validate as for text to video, and check that a first and a last frame are different frames."""
        params, warnings = super().round_and_validate(checkpoint, given)
        if params.num_frames == 1 and "last_image" in self.image_roles(checkpoint).required:
            message = f"num_frames: {self.num_frames} is not at least 5, the minimum with a last_image"
            raise InvalidInput(message, field="num_frames")
        return params, warnings


def temporal_factor(checkpoint: Checkpoint) -> int:
    """Frames per latent frame, except the first. Raises CheckpointError."""
    return _factor(checkpoint.module_config("vae"), "scale_factor_temporal", 4)


def _factor(vae: Mapping[str, Any], name: str, default: int) -> int:
    value = vae.get(name) or default
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(f"vae/config.json: {name}: {value!r} is not a whole number of at least 1")
    return value
