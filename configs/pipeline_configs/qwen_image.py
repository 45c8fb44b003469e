"""Qwen-Image: packed latents, a language model that reads the prompt in a template, guidance that keeps the norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from common.errors import CheckpointError
from configs.models.dits.qwen_image import QwenImageTransformerConfig
from configs.models.encodings import Template, TextEncoding, sequence_length, whole_prompt
from configs.models.fields import ConfigFields
from configs.models.vaes.qwen_image import AutoencoderKLQwenImageConfig
from configs.pipeline_configs.base import Keywords, Parts, Shapes, TextConfig
from configs.pipeline_configs.packed import (
    CONDITION,
    PackedPipelineConfig,
    SequenceShift,
    check_text_size,
    condition_parts,
    pack_patches,
    unpack_patches,
)

if TYPE_CHECKING:
    from common.artifacts import Canvas, Sampling
    from common.checkpoint import Checkpoint

MAX_SEQUENCE_LENGTH = 512

USUAL_TOKENS = 64
"""Of a prompt of a few sentences. Text is not padded: every prompt has a number of its own."""

TEMPLATE = Template(
    before="<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n",
    after="<|im_end|>\n<|im_start|>assistant\n",
    skipped=34,
)


@dataclass(frozen=True, kw_only=True)
class QwenImageFamilyConfig(PackedPipelineConfig):
    """The callbacks that Qwen-Image's pipelines share. `transformer_flags` are their values of the DiT's variants."""

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
    """Channels of pixels."""

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Read transformer, VAE and scheduler. Raises CheckpointError when they do not fit together."""
        transformer = QwenImageTransformerConfig.from_dict("transformer", checkpoint.module_config("transformer"))
        check_flags(transformer, cls.transformer_flags)
        vae = AutoencoderKLQwenImageConfig.from_dict("vae", checkpoint.module_config("vae"), cls.channels)
        if not transformer.in_channels == transformer.token_channels == 4 * vae.z_dim:
            raise CheckpointError(
                f"the transformer takes {transformer.in_channels} and makes {transformer.token_channels} channels a "
                f"token, but 2x2 patches of the VAE's {vae.z_dim} latent channels have {4 * vae.z_dim}"
            )
        text = checkpoint.module_config("text_encoder")
        # Older files have the language model's entries at the top.
        size = ConfigFields("text_encoder", text.get("text_config") or text).integer("hidden_size", 3584)
        check_text_size(size, "text_encoder", transformer.joint_attention_dim)
        shift = SequenceShift.from_dict("scheduler", checkpoint.config_of("scheduler"))
        return cls(transformer=transformer, vae=vae, shift=shift)

    @property
    def pixels_per_latent(self) -> int:
        """The VAE's."""
        return self.vae.spatial_factor

    def conditioning_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """A text of a usual length."""
        return {"encoder_hidden_states": (1, USUAL_TOKENS, self.transformer.joint_attention_dim)}

    def raw_latent_shapes(self, canvas: Canvas, batch: int) -> Shapes:
        """(batch, frames, channels, rows, columns): one frame; rows and columns even."""
        rows, columns = self.patches(canvas)
        return {"image": (batch, 1, self.vae.z_dim, 2 * rows, 2 * columns)}

    def pack(self, part: str, raw: Tensor) -> Tensor:
        """(B, frames, C, 2h, 2w) to (B, frames*h*w, 4C)."""
        del part
        tokens = pack_patches(raw.flatten(0, 1))
        return tokens.reshape(raw.shape[0], -1, tokens.shape[2])

    def unpack(self, part: str, latents: Tensor, raw_latent_shape: tuple[int, ...]) -> Tensor:
        """(B, frames*h*w, 4C) to the layout of the VAE, which has frames after channels: (B, C, frames, 2h, 2w)."""
        del part
        _, frames, *size = raw_latent_shape
        patches = latents.reshape(len(latents) * frames, -1, latents.shape[2])
        return unpack_patches(patches, *size).view(len(latents), frames, *size).transpose(1, 2)

    def prepare_pos_cond_kwargs(self, embeds: Parts, shapes: Shapes, sampling: Sampling) -> Keywords:
        """Positions (image, row, column) around each image's centre; text positions continue diagonally after them."""
        del sampling
        ordered = [shapes[part] for part in ("image", *condition_parts(shapes))]
        grids = [(shape[-2] // 2, shape[-1] // 2) for shape in ordered]
        edge = max(side // 2 for grid in grids for side in grid)
        own, *given = (positions(index, *grid) for index, grid in enumerate(grids))
        return {
            "txt_ids": text_positions(embeds, edge),
            "img_ids": own,
            "condition_ids": torch.cat(given) if given else None,
        }

    def model_input(self, latents: Parts, conditions: Parts) -> Parts:
        """The tokens of the image that is made, and those of all given images."""
        given = [conditions[part] for part in condition_parts(conditions)]
        return {**latents, CONDITION: torch.cat(given, dim=1)} if given else latents

    def guided(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """True classifier-free guidance, each token rescaled to the norm of the positive prediction."""
        guided = super().guided(positive, negative, scale)
        wanted, found = (torch.linalg.vector_norm(each, dim=-1, keepdim=True) for each in (positive, guided))
        rescaled: Tensor = guided * (wanted / found)
        return rescaled

    def vae_latents(self, raw: Tensor) -> Tensor:
        """Undo the normalisation of each channel."""
        mean, inverse = self._normalisation(raw)
        return raw / inverse + mean

    def _normalised(self, latents: Tensor) -> Tensor:
        """Normalised latents of an image (1, C, 1, 2h, 2w), with frames before channels like the noise."""
        mean, inverse = self._normalisation(latents)
        return ((latents - mean) * inverse).transpose(1, 2)

    def _normalisation(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and 1 / std of the latent channels, (1, z, 1, 1, 1)."""
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(like)
            for values in (self.vae.latents_mean, self.vae.latents_std)
        )
        return mean, 1.0 / std


@dataclass(frozen=True, kw_only=True)
class QwenImagePipelineConfig(QwenImageFamilyConfig, TextConfig):
    """QwenImagePipeline's callbacks."""

    title: ClassVar[str] = "Qwen-Image"
    deviations: ClassVar[str] = "A single step is refused, as it is NaN in Diffusers."

    @property
    def text_encodings(self) -> tuple[TextEncoding, ...]:
        """The language model's last states from the prompt on, without padding."""
        qwen = TextEncoding(
            keyword="encoder_hidden_states",
            tokenizer="tokenizer",
            encoder="text_encoder",
            text=whole_prompt,
            # Diffusers cuts behind the encoder. That is the same: the encoder looks only back.
            max_length=sequence_length(MAX_SEQUENCE_LENGTH),
            output=_from_the_prompt_on,
            template=TEMPLATE,
        )
        return (qwen,)


def check_flags(transformer: QwenImageTransformerConfig, flags: Mapping[str, bool]) -> None:
    """Refuse a DiT of another pipeline. Raises CheckpointError."""
    found = {name: vars(transformer)[name] for name in flags}
    for name, value in flags.items():
        if found[name] is not value:
            raise ConfigFields("transformer", found).error(name, f"is not supported; supported is {value!r}")


def text_positions(embeds: Parts, start: int) -> Tensor:
    """Positions of the text's tokens (tokens, 3), diagonal from `start` on."""
    text = torch.arange(embeds["encoder_hidden_states"].shape[1], dtype=torch.float32)
    return (text + start)[:, None].expand(-1, 3)


def positions(picture: int, rows: int, columns: int) -> Tensor:
    """Positions of a picture's tokens (rows * columns, 3); 0 is its middle, or just after it."""
    down = torch.arange(rows, dtype=torch.float32) - (rows - rows // 2)
    across = torch.arange(columns, dtype=torch.float32) - (columns - columns // 2)
    return torch.cartesian_prod(torch.tensor([float(picture)]), down, across)


def _from_the_prompt_on(output: Any, _: Tensor) -> Tensor:
    hidden: Tensor = output.last_hidden_state
    return hidden[:, TEMPLATE.skipped :]
