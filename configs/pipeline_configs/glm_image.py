"""GLM-Image, a hybrid model: its own stage before denoising, then the standard stages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from configs.models.dits.glm_image import GlmImageTransformerConfig
from configs.models.fields import ConfigFields
from configs.models.vaes.kl import AutoencoderKLConfig
from configs.models.vaes.statistics import latent_statistics
from configs.pipeline_configs.base import (
    DecodingConfig,
    DenoisingConfig,
    Keywords,
    NegativePromptConfig,
    Parts,
    PreparationConfig,
    Shapes,
    Step,
)
from configs.pipeline_configs.guidance import classifier_free, wants_guidance
from configs.pipeline_configs.normalization import channel_statistics
from configs.pipeline_configs.packed import SequenceShift, check_channels, check_text_size
from configs.sample.glm_image import GRID

if TYPE_CHECKING:
    from common.artifacts import Canvas, Prompt, Sampling
    from common.checkpoint import Checkpoint

MAX_GLYPH_TOKENS = 2048
TYPICAL_GLYPH_TOKENS = 1
"""Number of glyph tokens without quoted text: the end-of-sequence token. Glyphs are not padded."""


@dataclass(frozen=True, kw_only=True)
class GlmImagePipelineConfig(NegativePromptConfig, PreparationConfig, DenoisingConfig, DecodingConfig):
    """GlmImagePipeline's callbacks. Latents (B, channels, rows, columns) are not packed; a token is a 2x2 patch."""

    title: ClassVar[str] = "GLM-Image"
    deviations: ClassVar[str] = "Text to image only: Diffusers 0.42 fails for every input image."

    transformer: GlmImageTransformerConfig
    vae: AutoencoderKLConfig
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    shift: SequenceShift
    train_timesteps: int

    module_loaders: ClassVar[Mapping[str, str]] = {
        "GlmImageForConditionalGeneration": "models.encoder_runners.prior_tokens:load_glm_image_language_model",
        "GlmImageProcessor": "models.encoder_runners.prior_tokens:load_glm_image_processor",
        "GlmImageTransformer2DModel": "models.dits.glm_image_plan:load_glm_image_transformer",
        "ByT5Tokenizer": "models.loader:load_tokenizer",
    }
    parallel_modules: ClassVar[frozenset[str]] = frozenset({"GlmImageTransformer2DModel"})
    part_keywords: ClassVar[Mapping[str, str]] = {"image": "hidden_states"}
    visual_part: ClassVar[str] = "image"
    prediction_dtype: ClassVar[torch.dtype | None] = torch.float32

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Parse the modules' config.json. Raises CheckpointError for incompatible modules."""
        transformer = GlmImageTransformerConfig.from_dict("transformer", checkpoint.module_config("transformer"))
        fields = ConfigFields("vae", checkpoint.module_config("vae"))
        vae = AutoencoderKLConfig.from_dict("vae", fields.values)
        check_channels(transformer.in_channels, transformer.out_channels, vae.latent_channels)
        if 4 * vae.spatial_factor != GRID:
            raise fields.error("block_out_channels", f"a list of 4 entries; a patch is {GRID // 2} pixels wide")
        glyphs = ConfigFields("text_encoder", checkpoint.module_config("text_encoder"))
        check_text_size(
            glyphs.integer("d_model", transformer.text_embed_dim), "text_encoder", transformer.text_embed_dim
        )
        mean, std = latent_statistics(fields, vae.latent_channels)
        scheduler = checkpoint.config_of("scheduler")
        return cls(
            transformer=transformer,
            vae=vae,
            latents_mean=mean,
            latents_std=std,
            shift=SequenceShift.from_dict("scheduler", scheduler),
            train_timesteps=ConfigFields("scheduler", scheduler).integer("num_train_timesteps", 1000),
        )

    def prior_grid(self, canvas: Canvas) -> tuple[int, int]:
        """Rows and columns of the autoregressive model's token grid."""
        return canvas.height // GRID, canvas.width // GRID

    def max_glyph_tokens(self, prompt: Prompt) -> int:
        """Maximum number of tokens of each quoted text for the glyph encoder."""
        return prompt.max_sequence_length or MAX_GLYPH_TOKENS

    def wants_negative(self, prompt: Prompt, sampling: Sampling) -> bool:
        """Whether guidance is enabled: a scale above 1."""
        del prompt
        return wants_guidance(sampling)

    def raw_latent_shapes(self, canvas: Canvas, batch: int) -> Shapes:
        """(batch, channels, rows, columns)."""
        factor = self.vae.spatial_factor
        return {"image": (batch, self.vae.latent_channels, canvas.height // factor, canvas.width // factor)}

    def sigmas(self, sampling: Sampling) -> Sequence[float]:
        """The request's sigmas, or timesteps() / train_timesteps."""
        return sampling.sigmas or (self._timesteps(sampling) / self.train_timesteps).tolist()

    def timesteps(self, sampling: Sampling) -> Sequence[float]:
        """Evenly spaced whole numbers; the scheduler shifts only the noise levels."""
        return self._timesteps(sampling).tolist()

    def _timesteps(self, sampling: Sampling) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        steps = np.linspace(self.train_timesteps, 1.0, sampling.num_inference_steps + 1)[:-1]
        return np.trunc(steps).astype(np.float32)

    def mu(self, canvas: Canvas) -> float:
        """Linear in the square root of the number of image tokens."""
        tokens = 4 * math.prod(self.prior_grid(canvas))
        return math.sqrt(tokens / self.shift.base_image_seq_len) * self.shift.max_shift + self.shift.base_shift

    def conditioning_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape for a prompt without quoted text."""
        return {"encoder_hidden_states": (1, TYPICAL_GLYPH_TOKENS, self.transformer.text_embed_dim)}

    def conditioning_id_shapes(self, canvas: Canvas) -> Mapping[str, tuple[int, ...]]:
        """One prior token per image token."""
        return {"prior_token_id": (1, 4 * math.prod(self.prior_grid(canvas)))}

    def prepare_pos_cond_kwargs(self, embeds: Parts, shapes: Shapes, sampling: Sampling) -> Keywords:
        """Target size and crop coordinates in pixels (B, 2), with prior tokens."""
        return self._keywords(embeds, shapes, sampling, drop=False)

    def prepare_neg_cond_kwargs(self, embeds: Parts, shapes: Shapes, sampling: Sampling) -> Keywords:
        """Target size and crop coordinates in pixels (B, 2), without prior tokens."""
        return self._keywords(embeds, shapes, sampling, drop=True)

    def _keywords(self, embeds: Parts, shapes: Shapes, sampling: Sampling, *, drop: bool) -> Keywords:
        batch, _, rows, columns = shapes["image"]
        size = torch.tensor([rows, columns], dtype=torch.float32) * self.vae.spatial_factor
        corner = sampling.params.get("crops_coords_top_left", (0.0, 0.0))
        return {
            "prior_token_drop": torch.full((batch, embeds["prior_token_id"].shape[1]), drop),
            "target_size": size.expand(batch, -1),
            "crop_coords": torch.tensor(corner, dtype=torch.float32).expand(batch, -1),
        }

    def model_timestep(self, timesteps: Tensor) -> Tensor:
        """Subtract 1, as Diffusers does."""
        return timesteps - 1

    def guide(self, predictions: Mapping[str, Parts], latents: Parts, step: Step, sampling: Sampling) -> Parts:
        """Classifier-free guidance with `guidance_scale`."""
        del latents, step
        return {"image": classifier_free(predictions, "image", sampling.guidance_scale or 0.0)}

    def vae_latents(self, raw: Tensor) -> Tensor:
        """Undo the per-channel normalization."""
        mean, std = channel_statistics(self.latents_mean, self.latents_std, raw)
        return raw * std + mean
