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
    NEGATIVE,
    POSITIVE,
    ImageLatentsConfig,
    Keywords,
    Parts,
    Shapes,
    StandardPipelineConfig,
    Step,
    VisionConfig,
)

if TYPE_CHECKING:
    from common.artifacts import Canvas, Prompt, Sampling
    from common.checkpoint import Checkpoint

MAX_SEQUENCE_LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class WanPipelineConfig(StandardPipelineConfig):
    """WanPipeline's callbacks. Latents are float32 (B, z, frames, rows, columns) whatever the weights' type."""

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
        """Read transformer and VAE. Raises CheckpointError when they do not fit together."""
        transformer = cls.transformer_config.from_dict("transformer", checkpoint.module_config("transformer"))
        vae = AutoencoderKLWanConfig.from_dict("vae", checkpoint.module_config("vae"))
        needed = cls.input_channels(vae)
        if transformer.in_channels != needed or transformer.out_channels != vae.z_dim:
            raise CheckpointError(
                f"the transformer has {transformer.in_channels} input and {transformer.out_channels} output channels, "
                f"but with {vae.z_dim} channels of the VAE {checkpoint.pipeline_name} needs {needed} and {vae.z_dim}"
            )
        return cls(transformer=transformer, vae=vae)

    @classmethod
    def input_channels(cls, vae: AutoencoderKLWanConfig) -> int:
        """What the transformer takes: the noise."""
        return vae.z_dim

    @property
    def text_encodings(self) -> tuple[TextEncoding, ...]:
        """UMT5's sequence, padding set to zero; it is attended to nevertheless, as in training."""
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
        """Text is padded to 512 tokens, unless a request says otherwise."""
        return {"encoder_hidden_states": (1, MAX_SEQUENCE_LENGTH, self.transformer.text_dim)}

    def wants_negative(self, prompt: Prompt, sampling: Sampling) -> bool:
        """Guidance above 1 needs it; an unset negative prompt is an empty one."""
        del prompt
        return (sampling.guidance_scale or 0.0) > 1.0

    def raw_latent_shapes(self, canvas: Canvas, batch: int) -> Shapes:
        """(batch, channels, latent frames, rows, columns)."""
        side = self.vae.spatial_factor
        frames = self.vae.latent_frames(canvas.num_frames)
        return {"video": (batch, self.vae.z_dim, frames, canvas.height // side, canvas.width // side)}

    def sigmas(self, sampling: Sampling) -> Sequence[float] | None:
        """The scheduler's own."""
        del sampling
        return None

    def mu(self, canvas: Canvas) -> float | None:
        """The schedule does not depend on size."""
        del canvas
        return None

    def model_timestep(self, timesteps: Tensor) -> Tensor:
        """The schedule's whole numbers in [0, 1000)."""
        return timesteps

    def prepare_pos_cond_kwargs(self, embeds: Parts, shapes: Shapes, sampling: Sampling) -> Keywords:
        """None: positions follow from the latents' shape, and guidance is not embedded."""
        del embeds, shapes, sampling
        return {}

    def guide(self, predictions: Mapping[str, Parts], latents: Parts, step: Step, sampling: Sampling) -> Parts:
        """Classifier-free guidance."""
        del latents, step
        positive, negative = predictions[POSITIVE]["video"], predictions[NEGATIVE]["video"]
        return {"video": negative + (sampling.guidance_scale or 0.0) * (positive - negative)}

    def vae_latents(self, raw: Tensor) -> Tensor:
        """Undo the normalisation of each channel."""
        mean, inverse = self._normalisation(raw.device, raw.dtype)
        return raw / inverse + mean

    def _normalisation(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Mean and 1 / std of the latent channels, (1, z, 1, 1, 1)."""
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(device, dtype)
            for values in (self.vae.latents_mean, self.vae.latents_std)
        )
        return mean, 1.0 / std


@dataclass(frozen=True, kw_only=True)
class WanImageToVideoPipelineConfig(WanPipelineConfig, VisionConfig, ImageLatentsConfig):
    """WanImageToVideoPipeline's callbacks: beside the noise, the mask of what is given and its latents.

    `vision_tokens_of_picture` is how many the vision encoder makes of one.
    """

    title: ClassVar[str] = "Wan 2.1 I2V and FLF2V"
    deviations: ClassVar[str] = "Several outputs work, where Diffusers raises."

    vision_tokens_of_picture: int = 257

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Read the vision encoder's patches, too: it makes a token of each, and one of the whole picture."""
        config = super().from_checkpoint(checkpoint)
        if config.transformer.image_dim is None:
            return config
        fields = ConfigFields("image_encoder", checkpoint.config_of("image_encoder"))
        side = fields.integer("image_size", 224) // fields.integer("patch_size", 32)
        return replace(config, vision_tokens_of_picture=side * side + 1)

    @classmethod
    def input_channels(cls, vae: AutoencoderKLWanConfig) -> int:
        """Noise, a mask for each frame of a latent frame, and the pictures' latents."""
        return 2 * vae.z_dim + vae.temporal_factor

    def conditioning_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The vision encoder's tokens come beside the text: CLIP's of one picture, or those of two."""
        shapes = dict(super().conditioning_shapes())
        if self.transformer.image_dim is not None:
            tokens = self.transformer.pos_embed_seq_len or self.vision_tokens_of_picture
            shapes["encoder_hidden_states_image"] = (1, tokens, self.transformer.image_dim)
        return shapes

    def condition_shapes(self, canvas: Canvas) -> Shapes:
        """Mask and latents, as large as the video's."""
        batch, channels, *grid = self.raw_latent_shapes(canvas, 1)["video"]
        return {"condition": (batch, self.vae.temporal_factor + channels, *grid)}

    def model_input(self, latents: Parts, conditions: Parts) -> Parts:
        """Mask and latents of the images are further channels."""
        return {"video": torch.cat((latents["video"], conditions["condition"]), dim=1)}

    def vision_tokens(self, hidden_states: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """The last layer but one; tokens of first and last frame behind each other. Raises InvalidInput if they differ.

        Every picture makes (1, tokens, image_dim).
        """
        tokens = hidden_states[-2].flatten(0, 1)[None]
        expected = self.transformer.pos_embed_seq_len
        if expected is not None and tokens.shape[1] != expected:
            message = f"the model reads {expected} tokens of pictures, but these have {tokens.shape[1]}"
            raise InvalidInput(message, field="image")
        return {"encoder_hidden_states_image": tokens}

    def image_latents(self, encode: Callable[[Tensor], Tensor], images: Mapping[str, Tensor], canvas: Canvas) -> Parts:
        """Mask and normalised latents of a video that is grey where no frame is given; float32 (1, 4 + z, ...)."""
        frames = canvas.num_frames
        first, last = images["image"][:, :, None], images.get("last_image")
        given = 1 if last is None else 2
        grey = first.new_zeros(*first.shape[:2], max(frames - given, 0), *first.shape[3:])
        video = [first, grey] if last is None else [first, grey, last[:, :, None]]
        latents = encode(torch.cat(video, dim=2)).float()
        mean, inverse = self._normalisation(latents.device, latents.dtype)
        mask = self._mask(frames, last is not None, latents)
        return {"condition": torch.cat((mask, (latents - mean) * inverse), dim=1)}

    def _mask(self, frames: int, has_last: bool, latents: Tensor) -> Tensor:
        """1 where a frame is given: (1, 4, latent frames, rows, columns). The first frame counts four times."""
        factor, shape = self.vae.temporal_factor, latents.shape
        given = torch.zeros(factor - 1 + frames, dtype=latents.dtype, device=latents.device)
        given[:factor] = 1
        if has_last:
            given[-1] = 1
        mask = given.view(shape[2], factor).T
        return mask[None, :, :, None, None].expand(-1, -1, -1, *shape[3:])


def _cleaned_prompt(prompt: Prompt) -> PromptText:
    """Mend mojibake, resolve HTML entities (also doubly escaped ones), and make every run of whitespace one space."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt.prompt))).strip()
    return PromptText(field="prompt", text=re.sub(r"\s+", " ", text).strip())


def _unpadded(output: Any, mask: Tensor) -> Tensor:
    """The last hidden state, zero where there is padding (at the end)."""
    hidden: Tensor = output.last_hidden_state
    return hidden * mask[:, :, None].to(hidden.dtype)
