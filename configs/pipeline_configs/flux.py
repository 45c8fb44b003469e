"""FLUX.1: packed latents, guidance as an embedding, optional true classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from configs.models.dits.flux import FluxTransformerConfig
from configs.models.encodings import (
    TextEncoding,
    hidden_states,
    pooled_output,
    second_prompt,
    sequence_length,
    whole_prompt,
)
from configs.models.fields import ConfigFields
from configs.models.vaes.kl import AutoencoderKLConfig
from configs.pipeline_configs.base import Keywords, Parts, Shapes, TextConfig
from configs.pipeline_configs.packed import (
    PackedPipelineConfig,
    SequenceShift,
    check_patch_channels,
    check_text_size,
    pack_patches,
    unpack_patches,
)

if TYPE_CHECKING:
    from common.artifacts import Canvas, Prompt, Sampling
    from common.checkpoint import Checkpoint

MAX_SEQUENCE_LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class FluxPipelineConfig(PackedPipelineConfig, TextConfig):
    """FluxPipeline's callbacks. A token is a 2x2 patch of latents with channels ordered (c, dy, dx)."""

    title: ClassVar[str] = "FLUX.1 (dev, schnell and fine-tunes)"
    deviations: ClassVar[str] = "IP-Adapter images are not supported, as their encoders are not loaded."

    transformer: FluxTransformerConfig
    vae: AutoencoderKLConfig

    module_loaders: ClassVar[Mapping[str, str]] = {
        "FluxTransformer2DModel": "models.dits.flux_plan:load_flux_transformer"
    }
    parallel_modules: ClassVar[frozenset[str]] = frozenset({"FluxTransformer2DModel"})

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Parse the modules' config.json. Raises CheckpointError for incompatible modules."""
        transformer = FluxTransformerConfig.from_dict("transformer", checkpoint.module_config("transformer"))
        vae = AutoencoderKLConfig.from_dict("vae", checkpoint.module_config("vae"))
        check_patch_channels(transformer.in_channels, transformer.out_channels, vae.latent_channels)
        _check_size(checkpoint, "text_encoder", "hidden_size", transformer.pooled_projection_dim)
        _check_size(checkpoint, "text_encoder_2", "d_model", transformer.joint_attention_dim)
        shift = SequenceShift.from_dict("scheduler", checkpoint.config_of("scheduler"))
        return cls(transformer=transformer, vae=vae, shift=shift)

    @property
    def pixels_per_latent(self) -> int:
        """The VAE's spatial factor."""
        return self.vae.spatial_factor

    @property
    def text_encodings(self) -> tuple[TextEncoding, ...]:
        """CLIP's pooled output and T5's hidden states. T5 attends to padding, as in training."""
        clip = TextEncoding(
            keyword="pooled_projections",
            tokenizer="tokenizer",
            encoder="text_encoder",
            text=whole_prompt,
            max_length=_tokenizers_own,
            output=pooled_output,
        )
        t5 = TextEncoding(
            keyword="encoder_hidden_states",
            tokenizer="tokenizer_2",
            encoder="text_encoder_2",
            text=second_prompt,
            max_length=sequence_length(MAX_SEQUENCE_LENGTH),
            output=hidden_states(),
        )
        return (clip, t5)

    def conditioning_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """T5's text is padded to 512 tokens by default."""
        return {
            "pooled_projections": (1, self.transformer.pooled_projection_dim),
            "encoder_hidden_states": (1, MAX_SEQUENCE_LENGTH, self.transformer.joint_attention_dim),
        }

    def raw_latent_shapes(self, canvas: Canvas, batch: int) -> Shapes:
        """(batch, channels, rows, columns), rows and columns even."""
        rows, columns = self.patches(canvas)
        return {"image": (batch, self.vae.latent_channels, 2 * rows, 2 * columns)}

    def pack(self, part: str, raw: Tensor) -> Tensor:
        """(B, C, 2h, 2w) to (B, h*w, 4C)."""
        del part
        return pack_patches(raw)

    def unpack(self, part: str, latents: Tensor, raw_latent_shape: tuple[int, ...]) -> Tensor:
        """(B, h*w, 4C) to (B, C, 2h, 2w)."""
        del part
        return unpack_patches(latents, *raw_latent_shape[1:])

    def prepare_pos_cond_kwargs(self, embeds: Parts, shapes: Shapes, sampling: Sampling) -> Keywords:
        """Guidance for distilled models, and positions (0, row, column) of all tokens; 0 for text."""
        batch, _, rows, columns = shapes["image"]
        guidance = None
        if self.transformer.guidance_embeds:
            guidance = torch.full((batch,), sampling.guidance_scale or 0.0, dtype=torch.float32)
        axes = (torch.arange(size, dtype=torch.float32) for size in (1, rows // 2, columns // 2))
        return {
            "guidance": guidance,
            "txt_ids": torch.zeros(embeds["encoder_hidden_states"].shape[1], 3),
            "img_ids": torch.cartesian_prod(*axes),
        }

    def vae_latents(self, raw: Tensor) -> Tensor:
        """Undo the scaling, then undo the shift."""
        return raw / self.vae.scaling_factor + self.vae.shift_factor


def _check_size(checkpoint: Checkpoint, encoder: str, entry: str, expected: int) -> None:
    size = ConfigFields(encoder, checkpoint.module_config(encoder)).integer(entry, expected)
    check_text_size(size, encoder, expected)


def _tokenizers_own(_: Prompt) -> None:
    return None
