"""Wan: unpacked video latents, classifier-free guidance, text embeddings with zeroed padding."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import ftfy
import torch
from torch import Tensor

from common.errors import CheckpointError, InvalidInput
from configs.models.dits.wan import WanTransformerConfig
from configs.models.encodings import PromptText, TextEncoding, sequence_length
from configs.models.fields import ConfigFields
from configs.models.vaes.wan import AutoencoderKLWanConfig
from configs.pipeline_configs.base import (
    ImageLatentsConfig,
    Keywords,
    Parts,
    Shapes,
    StandardPipelineConfig,
    Step,
    VisionConfig,
)
from configs.pipeline_configs.guidance import classifier_free, wants_guidance
from configs.pipeline_configs.normalization import denormalized, normalized

if TYPE_CHECKING:
    from common.artifacts import Canvas, Prompt, Sampling
    from common.checkpoint import Checkpoint

MAX_SEQUENCE_LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class WanPipelineConfig(StandardPipelineConfig):
    """WanPipeline's callbacks. Latents (B, z, frames, rows, columns) are float32 for any dtype of the weights."""

    title: ClassVar[str] = "Wan 2.1 T2V"
    deviations: ClassVar[str] = ""

    transformer: WanTransformerConfig
    vae: AutoencoderKLWanConfig

    transformer_config: ClassVar[type[WanTransformerConfig]] = WanTransformerConfig
    part_keywords: ClassVar[Mapping[str, str]] = {"video": "hidden_states"}
    visual_part: ClassVar[str] = "video"
    has_float32_noise: ClassVar[bool] = True
    module_loaders: ClassVar[Mapping[str, str]] = {
        "WanTransformer3DModel": "models.dits.wan_plan:load_wan_transformer",
        "AutoencoderKLWan": "models.vaes.wan:load_wan_vae",
    }
    parallel_modules: ClassVar[frozenset[str]] = frozenset({"WanTransformer3DModel"})

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Parse the modules' config.json. Raises CheckpointError for incompatible modules."""
        transformer = cls.transformer_config.from_dict("transformer", checkpoint.module_config("transformer"))
        vae = AutoencoderKLWanConfig.from_dict("vae", checkpoint.module_config("vae"))
        needed = cls.input_channels(vae)
        if transformer.in_channels != needed or transformer.out_channels != vae.z_dim:
            raise CheckpointError(
                f"transformer/config.json: {transformer.in_channels} input and {transformer.out_channels} output "
                f"channels are not {needed} and {vae.z_dim}, the channels of {checkpoint.pipeline_name} with this VAE"
            )
        return cls(transformer=transformer, vae=vae)

    @classmethod
    def input_channels(cls, vae: AutoencoderKLWanConfig) -> int:
        """The transformer's input channels: the channels of the noise."""
        return vae.z_dim

    @property
    def text_encodings(self) -> tuple[TextEncoding, ...]:
        """UMT5's hidden states with padding set to 0; the denoiser attends to padding, as in training."""
        umt5 = TextEncoding(
            keyword="encoder_hidden_states",
            tokenizer="tokenizer",
            encoder="text_encoder",
            text=_cleaned_prompt,
            max_length=sequence_length(MAX_SEQUENCE_LENGTH),
            output=_unpadded,
            masked=True,
        )
        return (umt5,)

    def conditioning_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Text is padded to 512 tokens by default."""
        return {"encoder_hidden_states": (1, MAX_SEQUENCE_LENGTH, self.transformer.text_dim)}

    def wants_negative(self, prompt: Prompt, sampling: Sampling) -> bool:
        """Whether guidance is enabled: a scale above 1; an unset negative prompt is empty."""
        del prompt
        return wants_guidance(sampling)

    def raw_latent_shapes(self, canvas: Canvas, batch: int) -> Shapes:
        """(batch, channels, latent frames, rows, columns)."""
        side = self.vae.spatial_factor
        frames = self.vae.latent_frames(canvas.num_frames)
        return {"video": (batch, self.vae.z_dim, frames, canvas.height // side, canvas.width // side)}

    def sigmas(self, sampling: Sampling) -> Sequence[float] | None:
        """None: the scheduler's own noise levels."""
        del sampling
        return None

    def mu(self, canvas: Canvas) -> float | None:
        """None: the schedule does not depend on the size."""
        del canvas
        return None

    def model_timestep(self, timesteps: Tensor) -> Tensor:
        """The schedule's timesteps, in [0, 1000]."""
        return timesteps

    def prepare_pos_cond_kwargs(self, embeds: Parts, shapes: Shapes, sampling: Sampling) -> Keywords:
        """No keywords: positions depend only on the latents' shape, and guidance is not embedded."""
        del embeds, shapes, sampling
        return {}

    def guide(self, predictions: Mapping[str, Parts], latents: Parts, step: Step, sampling: Sampling) -> Parts:
        """Classifier-free guidance with `guidance_scale`."""
        del latents, step
        return {"video": classifier_free(predictions, "video", sampling.guidance_scale or 0.0)}

    def vae_latents(self, raw: Tensor) -> Tensor:
        """Undo the per-channel normalization."""
        return denormalized(raw, self.vae.latents_mean, self.vae.latents_std)


@dataclass(frozen=True, kw_only=True)
class WanImageToVideoPipelineConfig(WanPipelineConfig, VisionConfig, ImageLatentsConfig):
    """WanImageToVideoPipeline's callbacks; mask and image latents are further input channels of the DiT.

    `vision_tokens_per_image` is the vision encoder's number of tokens per image.
    """

    title: ClassVar[str] = "Wan 2.1 I2V and FLF2V"
    deviations: ClassVar[str] = "Several outputs work, where Diffusers raises."

    vision_tokens_per_image: int = 257

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Parse all modules' config.json. The vision encoder has one token per patch and a class token."""
        config = super().from_checkpoint(checkpoint)
        if config.transformer.image_dim is None:
            return config
        fields = ConfigFields("image_encoder", checkpoint.config_of("image_encoder"))
        side = fields.integer("image_size", 224) // fields.integer("patch_size", 32)
        return replace(config, vision_tokens_per_image=side * side + 1)

    @classmethod
    def input_channels(cls, vae: AutoencoderKLWanConfig) -> int:
        """Channels of noise, image latents and mask; the mask has one channel per frame of a latent frame."""
        return 2 * vae.z_dim + vae.temporal_factor

    def conditioning_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of text and vision tokens; models with `pos_embed_seq_len` have the tokens of two images."""
        shapes = dict(super().conditioning_shapes())
        if self.transformer.image_dim is not None:
            tokens = self.transformer.pos_embed_seq_len or self.vision_tokens_per_image
            shapes["encoder_hidden_states_image"] = (1, tokens, self.transformer.image_dim)
        return shapes

    def condition_shapes(self, canvas: Canvas) -> Shapes:
        """Mask and image latents, which have the frames, rows and columns of the video's latents."""
        batch, channels, *grid = self.raw_latent_shapes(canvas, 1)["video"]
        return {"condition": (batch, self.vae.temporal_factor + channels, *grid)}

    def model_input(self, latents: Parts, conditions: Parts) -> Parts:
        """Concatenate mask and latents of the images as further channels."""
        return {"video": torch.cat((latents["video"], conditions["condition"]), dim=1)}

    def vision_tokens(self, hidden_states: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Hidden states (1, tokens, image_dim) of the second-to-last layer, concatenated for both frames.

        Raises InvalidInput if the number of tokens differs from the transformer's `pos_embed_seq_len`.
        """
        tokens = hidden_states[-2].flatten(0, 1)[None]
        expected = self.transformer.pos_embed_seq_len
        if expected is not None and tokens.shape[1] != expected:
            message = (
                f"image: {tokens.shape[1]} vision tokens are not {expected}, the number that the transformer requires"
            )
            raise InvalidInput(message, field="image")
        return {"encoder_hidden_states_image": tokens}

    def image_latents(self, encode: Callable[[Tensor], Tensor], images: Mapping[str, Tensor], canvas: Canvas) -> Parts:
        """Mask and latents (float32, 1, 4 + z, ...) of a video that is gray except for the input frames."""
        frames = canvas.num_frames
        first, last = images["image"][:, :, None], images.get("last_image")
        count = 1 if last is None else 2
        gray = first.new_zeros(*first.shape[:2], max(frames - count, 0), *first.shape[3:])
        video = [first, gray] if last is None else [first, gray, last[:, :, None]]
        latents = encode(torch.cat(video, dim=2)).float()
        mask = self._mask(frames, last is not None, latents)
        return {"condition": torch.cat((mask, normalized(latents, self.vae.latents_mean, self.vae.latents_std)), dim=1)}

    def _mask(self, frames: int, has_last: bool, latents: Tensor) -> Tensor:
        """Mask (1, 4, latent frames, rows, columns): 1 for input frames. The first frame is repeated four times."""
        factor, shape = self.vae.temporal_factor, latents.shape
        mask = torch.zeros(factor - 1 + frames, dtype=latents.dtype, device=latents.device)
        mask[:factor] = 1
        if has_last:
            mask[-1] = 1
        return mask.view(shape[2], factor).T[None, :, :, None, None].expand(-1, -1, -1, *shape[3:])


def _cleaned_prompt(prompt: Prompt) -> PromptText:
    """Fix mojibake, unescape HTML entities twice, and collapse whitespace, as Diffusers does."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt.prompt))).strip()
    return PromptText(field="prompt", text=re.sub(r"\s+", " ", text).strip())


def _unpadded(output: Any, mask: Tensor) -> Tensor:
    """The last hidden state with padding set to 0."""
    hidden: Tensor = output.last_hidden_state
    return hidden * mask[:, :, None].to(hidden.dtype)
