"""Qwen-Image: packed latents, a language model with a prompt template, norm-preserving guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from configs.models.dits.qwen_image import QwenImageTransformerConfig
from configs.models.encodings import Template, TextEncoding, hidden_states, sequence_length, whole_prompt
from configs.models.fields import ConfigFields
from configs.models.vaes.qwen_image import AutoencoderKLQwenImageConfig
from configs.pipeline_configs.base import Keywords, Parts, Shapes, TextConfig
from configs.pipeline_configs.normalization import denormalized, normalized
from configs.pipeline_configs.packed import (
    CONDITION,
    PackedPipelineConfig,
    SequenceShift,
    check_patch_channels,
    check_text_size,
    condition_parts,
    pack_patches,
    unpack_patches,
)

if TYPE_CHECKING:
    from common.artifacts import Canvas, Sampling
    from common.checkpoint import Checkpoint

MAX_SEQUENCE_LENGTH = 512

TYPICAL_TOKENS = 64
"""Number of tokens of a typical prompt, for warm-up. Text is not padded."""

TEMPLATE = Template(
    before="<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
    after="<|im_end|>\n<|im_start|>assistant\n",
    skipped=34,
)


@dataclass(frozen=True, kw_only=True)
class QwenImageFamilyConfig(PackedPipelineConfig):
    """Callbacks shared by Qwen-Image's pipelines. `transformer_flags` are the required flags of the DiT."""

    transformer: QwenImageTransformerConfig
    vae: AutoencoderKLQwenImageConfig

    module_loaders: ClassVar[Mapping[str, str]] = {
        "AutoencoderKLQwenImage": "models.vaes.qwen_image:load_qwen_image_vae",
        "Qwen2_5_VLForConditionalGeneration": "models.encoder_runners.qwen_vl:load_qwen_text_model",
        "QwenImageTransformer2DModel": "models.dits.qwen_image_plan:load_qwen_image_transformer",
    }
    parallel_modules: ClassVar[frozenset[str]] = frozenset({"QwenImageTransformer2DModel"})
    transformer_flags: ClassVar[Mapping[str, bool]] = {
        "zero_cond_t": False,
        "use_additional_t_cond": False,
        "use_layer3d_rope": False,
    }
    condition_keywords: ClassVar[Mapping[str, str]] = {CONDITION: "condition_states"}
    channels: ClassVar[int] = 3
    """Channels of images."""

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Parse the modules' config.json. Raises CheckpointError for incompatible modules."""
        transformer = QwenImageTransformerConfig.from_dict("transformer", checkpoint.module_config("transformer"))
        check_flags(transformer, cls.transformer_flags)
        vae = AutoencoderKLQwenImageConfig.from_dict("vae", checkpoint.module_config("vae"), cls.channels)
        check_patch_channels(transformer.in_channels, transformer.token_channels, vae.z_dim)
        text = checkpoint.module_config("text_encoder")
        # Older files do not nest the language model's entries.
        size = ConfigFields("text_encoder", text.get("text_config") or text).integer("hidden_size", 3584)
        check_text_size(size, "text_encoder", transformer.joint_attention_dim)
        shift = SequenceShift.from_dict("scheduler", checkpoint.config_of("scheduler"))
        return cls(transformer=transformer, vae=vae, shift=shift)

    @property
    def pixels_per_latent(self) -> int:
        """The VAE's spatial factor."""
        return self.vae.spatial_factor

    def conditioning_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape for a typical prompt."""
        return {"encoder_hidden_states": (1, TYPICAL_TOKENS, self.transformer.joint_attention_dim)}

    def raw_latent_shapes(self, canvas: Canvas, batch: int) -> Shapes:
        """(batch, 1, channels, rows, columns); rows and columns are even."""
        rows, columns = self.patches(canvas)
        return {"image": (batch, 1, self.vae.z_dim, 2 * rows, 2 * columns)}

    def pack(self, part: str, raw: Tensor) -> Tensor:
        """(B, frames, C, 2h, 2w) to (B, frames*h*w, 4C)."""
        del part
        tokens = pack_patches(raw.flatten(0, 1))
        return tokens.reshape(raw.shape[0], -1, tokens.shape[2])

    def unpack(self, part: str, latents: Tensor, raw_latent_shape: tuple[int, ...]) -> Tensor:
        """(B, frames*h*w, 4C) to the VAE's layout, (B, C, frames, 2h, 2w)."""
        del part
        _, frames, *size = raw_latent_shape
        patches = latents.reshape(len(latents) * frames, -1, latents.shape[2])
        return unpack_patches(patches, *size).view(len(latents), frames, *size).transpose(1, 2)

    def prepare_pos_cond_kwargs(self, embeds: Parts, shapes: Shapes, sampling: Sampling) -> Keywords:
        """Positions (image, row, column) relative to each image's center, then diagonal text positions."""
        del sampling
        ordered = [shapes[part] for part in ("image", *condition_parts(shapes))]
        grids = [(shape[-2] // 2, shape[-1] // 2) for shape in ordered]
        edge = max(side // 2 for grid in grids for side in grid)
        generated, *inputs = (positions(index, *grid) for index, grid in enumerate(grids))
        return {
            "txt_ids": text_positions(embeds, edge),
            "img_ids": generated,
            "condition_ids": torch.cat(inputs) if inputs else None,
        }

    def model_input(self, latents: Parts, conditions: Parts) -> Parts:
        """The generated image's tokens, and the concatenated tokens of all input images."""
        given = [conditions[part] for part in condition_parts(conditions)]
        return {**latents, CONDITION: torch.cat(given, dim=1)} if given else latents

    def guided(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """True classifier-free guidance with each token rescaled to the positive prediction's norm."""
        guided = super().guided(positive, negative, scale)
        target, norm = (torch.linalg.vector_norm(each, dim=-1, keepdim=True) for each in (positive, guided))
        rescaled: Tensor = guided * (target / norm)
        return rescaled

    def vae_latents(self, raw: Tensor) -> Tensor:
        """Undo the per-channel normalization."""
        return denormalized(raw, self.vae.latents_mean, self.vae.latents_std)

    def _normalized(self, latents: Tensor) -> Tensor:
        """Normalize an image's latents (1, C, 1, 2h, 2w) and move frames before channels, as in the noise."""
        return normalized(latents, self.vae.latents_mean, self.vae.latents_std).transpose(1, 2)


@dataclass(frozen=True, kw_only=True)
class QwenImagePipelineConfig(QwenImageFamilyConfig, TextConfig):
    """QwenImagePipeline's callbacks."""

    title: ClassVar[str] = "Qwen-Image"
    deviations: ClassVar[str] = "A single step is rejected, as it is NaN in Diffusers."

    @property
    def text_encodings(self) -> tuple[TextEncoding, ...]:
        """The language model's last hidden states after the template's prefix, without padding."""
        qwen = TextEncoding(
            keyword="encoder_hidden_states",
            tokenizer="tokenizer",
            encoder="text_encoder",
            text=whole_prompt,
            # Diffusers truncates the encoder's output instead; the result is equal, as the encoder is causal.
            max_length=sequence_length(MAX_SEQUENCE_LENGTH),
            output=hidden_states(skipped=TEMPLATE.skipped),
            template=TEMPLATE,
        )
        return (qwen,)


def check_flags(transformer: QwenImageTransformerConfig, flags: Mapping[str, bool]) -> None:
    """Check that the DiT's flags equal the pipeline's required flags. Raises CheckpointError."""
    found = {name: vars(transformer)[name] for name in flags}
    for name, value in flags.items():
        if found[name] is not value:
            raise ConfigFields("transformer", found).error(name, f"{value!r}, the only supported value")


def text_positions(embeds: Parts, start: int) -> Tensor:
    """Diagonal positions of the text's tokens (tokens, 3), beginning at `start`."""
    text = torch.arange(embeds["encoder_hidden_states"].shape[1], dtype=torch.float32)
    return (text + start)[:, None].expand(-1, 3)


def positions(image: int, rows: int, columns: int) -> Tensor:
    """Positions (image, row, column) of an image's tokens, (rows * columns, 3).

    The row and the column at position 0 directly follow the center.
    """
    down = torch.arange(rows, dtype=torch.float32) - (rows - rows // 2)
    across = torch.arange(columns, dtype=torch.float32) - (columns - columns // 2)
    return torch.cartesian_prod(torch.tensor([float(image)]), down, across)
