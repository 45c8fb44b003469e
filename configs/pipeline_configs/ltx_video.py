"""LTX-Video: text or image to video; packed video tokens, guidance by a negative prompt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from configs.models.dits.ltx_video import LTXVideoTransformerConfig
from configs.models.encodings import TextEncoding, sequence_length, whole_prompt
from configs.models.fields import ConfigFields
from configs.models.vaes.ltx_video import LTXVideoVAEConfig
from configs.pipeline_configs.base import (
    POSITIVE,
    DecodingNoise,
    Keywords,
    Parts,
    Shapes,
    StandardPipelineConfig,
    Step,
)
from configs.pipeline_configs.first_frame import FirstFrameConfig
from configs.pipeline_configs.guidance import classifier_free, rescaled, wants_guidance
from configs.pipeline_configs.packed import SequenceShift, check_channels, check_text_size

if TYPE_CHECKING:
    from common.artifacts import Canvas, Prompt, Sampling
    from common.checkpoint import Checkpoint

MAX_SEQUENCE_LENGTH = 128
TYPICAL_TOKENS = 64
"""Number of tokens of a typical prompt, for warm-up. Padding is removed."""
_FRAME_RATE = 25.0


@dataclass(frozen=True, kw_only=True)
class LTXVideoPipelineConfig(StandardPipelineConfig):
    """LTXPipeline's callbacks. Latents (B, S, C) are float32, normalized and packed, for any dtype of the weights."""

    title: ClassVar[str] = "LTX-Video (0.9.0 and 0.9.5)"
    deviations: ClassVar[str] = (
        "Several outputs work with the VAE of 0.9.5, where Diffusers raises. A VAE that injects noise (0.9.1) is "
        "rejected, as its noise ignores the seed. Frames are rounded to whole latent frames, with a warning. A "
        "single step is rejected: Diffusers fails, as its schedule is NaN."
    )

    transformer: LTXVideoTransformerConfig
    vae: LTXVideoVAEConfig
    shift: SequenceShift

    part_keywords: ClassVar[Mapping[str, str]] = {"video": "hidden_states"}
    prediction_dtype: ClassVar[torch.dtype | None] = torch.float32
    visual_part: ClassVar[str] = "video"
    denormalising_dtype: ClassVar[torch.dtype | None] = torch.float32
    has_float32_noise: ClassVar[bool] = True
    module_loaders: ClassVar[Mapping[str, str]] = {
        "AutoencoderKLLTXVideo": "models.vaes.ltx_video:load_ltx_video_vae",
        "LTXVideoTransformer3DModel": "models.dits.ltx_video_plan:load_ltx_video_transformer",
    }
    parallel_modules: ClassVar[frozenset[str]] = frozenset({"LTXVideoTransformer3DModel"})

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Parse the modules' config.json. Raises CheckpointError for incompatible modules."""
        transformer = LTXVideoTransformerConfig.from_dict("transformer", checkpoint.module_config("transformer"))
        vae = LTXVideoVAEConfig.from_dict("vae", checkpoint.module_config("vae"))
        check_channels(transformer.in_channels, transformer.out_channels, vae.latent_channels)
        encoder = ConfigFields("text_encoder", checkpoint.module_config("text_encoder"))
        check_text_size(encoder.integer("d_model", 512), "text_encoder", transformer.caption_channels)
        shift = SequenceShift.from_dict("scheduler", checkpoint.config_of("scheduler"))
        return cls(transformer=transformer, vae=vae, shift=shift)

    @property
    def text_encodings(self) -> tuple[TextEncoding, ...]:
        """T5's hidden states. T5 attends to padding, as in training; padding is then removed."""
        t5 = TextEncoding(
            keyword="encoder_hidden_states",
            tokenizer="tokenizer",
            encoder="text_encoder",
            text=whole_prompt,
            max_length=sequence_length(MAX_SEQUENCE_LENGTH),
            output=_without_padding,
        )
        return (t5,)

    def conditioning_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape for a typical prompt."""
        return {"encoder_hidden_states": (1, TYPICAL_TOKENS, self.transformer.caption_channels)}

    def wants_negative(self, prompt: Prompt, sampling: Sampling) -> bool:
        """Whether guidance is enabled: a scale above 1; an unset negative prompt is empty."""
        del prompt
        return wants_guidance(sampling)

    def raw_latent_shapes(self, canvas: Canvas, batch: int) -> Shapes:
        """(batch, channels, latent frames, rows, columns)."""
        side, frames = self.vae.spatial_factor, self.vae.latent_frames(canvas.num_frames)
        return {"video": (batch, self.vae.latent_channels, frames, canvas.height // side, canvas.width // side)}

    def pack(self, part: str, raw: Tensor) -> Tensor:
        """Flatten latents to tokens: (B, C, frames, rows, columns) to (B, S, C)."""
        del part
        return raw.flatten(2).transpose(1, 2).contiguous()

    def unpack(self, part: str, latents: Tensor, raw_latent_shape: tuple[int, ...]) -> Tensor:
        """(B, S, C) to (B, C, frames, rows, columns)."""
        del part
        return latents.transpose(1, 2).reshape(raw_latent_shape)

    def sigmas(self, sampling: Sampling) -> Sequence[float]:
        """Evenly spaced from 1 to 1/steps."""
        steps = sampling.num_inference_steps
        return [float(sigma) for sigma in np.linspace(1.0, 1.0 / steps, steps)]

    def mu(self, canvas: Canvas) -> float:
        """The shift from the number of video tokens."""
        *_, frames, rows, columns = self.raw_latent_shapes(canvas, 1)["video"]
        return self.shift.mu(frames * rows * columns)

    def model_timestep(self, timesteps: Tensor) -> Tensor:
        """The schedule's timesteps, in [0, 1000]."""
        return timesteps

    def prepare_pos_cond_kwargs(self, embeds: Parts, shapes: Shapes, sampling: Sampling) -> Keywords:
        """Positions of all tokens, (S, 3)."""
        del embeds
        return {"positions": self._positions(shapes, sampling)}

    def _positions(self, shapes: Shapes, sampling: Sampling) -> Tensor:
        """Time (seconds), row and column (pixels) of each token's origin, float32 (S, 3)."""
        frame_rate = sampling.params.get("conditioning_frame_rate", _FRAME_RATE)
        assert isinstance(frame_rate, float), "LTXVideoSamplingParams validates it"
        units = (self.vae.temporal_factor / frame_rate, self.vae.spatial_factor, self.vae.spatial_factor)
        axes = (
            torch.arange(size, dtype=torch.float32) * unit
            for size, unit in zip(shapes["video"][2:], units, strict=True)
        )
        return torch.cartesian_prod(*axes)

    def guide(self, predictions: Mapping[str, Parts], latents: Parts, step: Step, sampling: Sampling) -> Parts:
        """Classifier-free guidance with rescaling to the positive prediction's standard deviation."""
        del latents, step
        guided = classifier_free(predictions, "video", sampling.guidance_scale or 0.0)
        fraction = sampling.params.get("guidance_rescale", 0.0)
        assert isinstance(fraction, float), "LTXVideoSamplingParams validates it"
        return {"video": rescaled(guided, predictions[POSITIVE]["video"], fraction)}

    def decoding_noise(self, sampling: Sampling) -> DecodingNoise | None:
        """The request's noise settings, if the decoder removes noise; by default, scale equals timestep."""
        if not self.vae.removes_noise:
            return None
        timestep = sampling.params.get("decode_timestep", 0.0)
        scale = sampling.params.get("decode_noise_scale", timestep)
        assert isinstance(timestep, float), "LTXVideoSamplingParams validates it"
        assert isinstance(scale, float), "LTXVideoSamplingParams validates it"
        return DecodingNoise(scale=scale, timestep=timestep)

    def vae_latents(self, raw: Tensor) -> Tensor:
        """Unchanged: the VAE denormalizes with statistics in its weights."""
        return raw


@dataclass(frozen=True, kw_only=True)
class LTXVideoImageToVideoPipelineConfig(FirstFrameConfig, LTXVideoPipelineConfig):
    """LTXImageToVideoPipeline's callbacks: the image is the first latent frame."""

    frame_dim: ClassVar[int] = 1

    def posterior_shape(self, canvas: Canvas) -> tuple[int, ...]:
        """Shape of one latent frame."""
        return self.condition_shapes(canvas)["condition"]

    def prepare_pos_cond_kwargs(self, embeds: Parts, shapes: Shapes, sampling: Sampling) -> Keywords:
        """Positions of the first latent frame's tokens, and of the other tokens."""
        del embeds
        positions, boundary = self._positions(shapes, sampling), math.prod(shapes["condition"][2:])
        return {"first_positions": positions[:boundary], "positions": positions[boundary:]}

    def before_step(self, step: Step, latents: Parts, conditions: Parts) -> Parts:
        """Restore the image as the first latent frame."""
        del step
        return self.with_first_frame(latents, conditions)


def _without_padding(output: Any, mask: Tensor) -> Tensor:
    """The last hidden state without padding, batch 1."""
    hidden: Tensor = output.last_hidden_state
    return hidden[:, mask[0].bool()]
