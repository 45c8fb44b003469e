"""FLUX.2: packed latents, hidden states of several language model layers, reference images as tokens.

Callbacks shared by dev and klein, with and without reference images.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from common.errors import CheckpointError
from configs.models.dits.flux2 import Flux2TransformerConfig
from configs.models.encodings import TextEncoding, sequence_length
from configs.models.fields import ConfigFields
from configs.models.vaes.flux2 import AutoencoderKLFlux2Config, area_limited
from configs.pipeline_configs.base import (
    ImageLatentsConfig,
    Keywords,
    Parts,
    Shapes,
    StandardPipelineConfig,
    Step,
)
from configs.pipeline_configs.guidance import classifier_free
from configs.pipeline_configs.packed import (
    CONDITION,
    check_patch_channels,
    check_text_size,
    condition_name,
    condition_parts,
)

if TYPE_CHECKING:
    from common.artifacts import Canvas, Prompt, Sampling
    from common.checkpoint import Checkpoint
    from configs.models.encodings import PromptText

MAX_SEQUENCE_LENGTH = 512
PATCH = 2
REFERENCE_IMAGE_DISTANCE = 10
"""Distance of reference images along the first position axis; the generated image is at 0."""

MAX_TOKENS_SHIFTED_BY_STEPS = 4300
"""Above this number of image tokens, the shift does not depend on the number of steps."""


@dataclass(frozen=True, kw_only=True)
class Flux2FamilyConfig(StandardPipelineConfig):
    """Callbacks shared by dev and klein. A token is a 2x2 patch of latents with channels ordered (c, dy, dx)."""

    transformer: Flux2TransformerConfig
    vae: AutoencoderKLFlux2Config

    module_loaders: ClassVar[Mapping[str, str]] = {
        "AutoencoderKLFlux2": "models.vaes.flux2:load_flux2_vae",
        "Flux2Transformer2DModel": "models.dits.flux2_plan:load_flux2_transformer",
    }
    parallel_modules: ClassVar[frozenset[str]] = frozenset({"Flux2Transformer2DModel"})
    part_keywords: ClassVar[Mapping[str, str]] = {"image": "hidden_states"}
    visual_part: ClassVar[str] = "image"

    guidance_embeds: ClassVar[bool]
    """Whether the DiT embeds the guidance scale."""
    text_layers: ClassVar[tuple[int, ...]]
    """Layers of the language model whose hidden states are concatenated."""

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Parse the modules' config.json. Raises CheckpointError for incompatible modules."""
        transformer = Flux2TransformerConfig.from_dict("transformer", checkpoint.module_config("transformer"))
        vae = AutoencoderKLFlux2Config.from_dict("vae", checkpoint.module_config("vae"))
        check_patch_channels(transformer.in_channels, transformer.out_channels, vae.latent_channels)
        if transformer.guidance_embeds is not cls.guidance_embeds:
            found, supported = transformer.guidance_embeds, cls.guidance_embeds
            raise CheckpointError(
                f"transformer/config.json: guidance_embeds: {found} is not {supported}, the only supported value"
            )
        cls._check_text_encoder(checkpoint, transformer.joint_attention_dim)
        return cls(transformer=transformer, vae=vae, **cls._further_fields(checkpoint))

    @classmethod
    def _check_text_encoder(cls, checkpoint: Checkpoint, expected: int) -> None:
        config = checkpoint.module_config("text_encoder")
        # Vision-language models nest the language model's entries.
        text = ConfigFields("text_encoder", config.get("text_config") or config)
        text.integer("num_hidden_layers", 32, minimum=cls.text_layers[-1])
        check_text_size(len(cls.text_layers) * text.integer("hidden_size", 4096), "text_encoder", expected)

    @classmethod
    def _further_fields(cls, checkpoint: Checkpoint) -> dict[str, Any]:
        """Additional fields of a subclass, by name."""
        del checkpoint
        return {}

    @abstractmethod
    def chat(self, prompt: Prompt) -> PromptText:
        """The prompt in the chat template, as the language model's input."""

    @property
    def text_encodings(self) -> tuple[TextEncoding, ...]:
        """The language model's hidden states of text_layers. The denoiser attends to padding, as in training."""
        return (self.text_encoding,)

    @property
    def text_encoding(self) -> TextEncoding:
        """The encoding shared by dev and klein, which override some of its fields."""
        return TextEncoding(
            keyword="encoder_hidden_states",
            tokenizer="tokenizer",
            encoder="text_encoder",
            text=self.chat,
            max_length=sequence_length(MAX_SEQUENCE_LENGTH),
            output=self._states,
            masked=True,
        )

    def _states(self, output: Any, _: Tensor) -> Tensor:
        return torch.cat([output.hidden_states[layer] for layer in self.text_layers], dim=-1)

    def conditioning_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Text is padded to 512 tokens by default."""
        return {"encoder_hidden_states": (1, MAX_SEQUENCE_LENGTH, self.transformer.joint_attention_dim)}

    def raw_latent_shapes(self, canvas: Canvas, batch: int) -> Shapes:
        """(batch, channels, rows, columns) of 2x2 patches."""
        side = self.pixels_per_patch
        return {"image": (batch, self.transformer.in_channels, canvas.height // side, canvas.width // side)}

    @property
    def pixels_per_patch(self) -> int:
        """Pixels along each side of a token."""
        return PATCH * self.vae.spatial_factor

    def pack(self, part: str, raw: Tensor) -> Tensor:
        """(B, 4C, h, w) to (B, h*w, 4C)."""
        del part
        return raw.flatten(2).transpose(1, 2)

    def unpack(self, part: str, latents: Tensor, raw_latent_shape: tuple[int, ...]) -> Tensor:
        """(B, h*w, 4C) to (B, 4C, h, w)."""
        del part
        return latents.transpose(1, 2).reshape(latents.shape[0], *raw_latent_shape[1:])

    def sigmas(self, sampling: Sampling) -> Sequence[float]:
        """The request's sigmas, or evenly spaced from 1 to 1/steps."""
        steps = sampling.num_inference_steps
        return sampling.sigmas or np.linspace(1.0, 1.0 / steps, steps).tolist()

    def mu(self, canvas: Canvas) -> float:
        """The shift for 200 steps; above MAX_TOKENS_SHIFTED_BY_STEPS tokens, for any number of steps."""
        return 0.00016927 * self._tokens(canvas) + 0.45666666

    def mu_of_steps(self, canvas: Canvas, sampling: Sampling) -> float:
        """Linear in the number of steps (shift_steps with sigmas), through the shifts for 10 and 200 steps."""
        tokens, of_200_steps = self._tokens(canvas), self.mu(canvas)
        if tokens > MAX_TOKENS_SHIFTED_BY_STEPS:
            return of_200_steps
        of_10_steps = 8.73809524e-05 * tokens + 1.89833333
        slope = (of_200_steps - of_10_steps) / 190.0
        steps = sampling.params.get("shift_steps", sampling.num_inference_steps)
        assert isinstance(steps, int)
        return slope * steps + of_200_steps - 200.0 * slope

    def prepare_pos_cond_kwargs(self, embeds: Parts, shapes: Shapes, sampling: Sampling) -> Keywords:
        """Positions (image, row, column, text token), and the guidance scale (B,) if the DiT embeds guidance."""
        text = torch.arange(embeds["encoder_hidden_states"].shape[1], dtype=torch.float32)
        images = [shapes[part] for part in ("image", *condition_parts(shapes))]
        guidance = torch.full((shapes["image"][0],), sampling.guidance_scale or 0.0) if self.guidance_embeds else None
        return {
            "guidance": guidance,
            "txt_ids": torch.nn.functional.pad(text[:, None], (3, 0)),
            "img_ids": torch.cat([_positions(index, *shape[2:]) for index, shape in enumerate(images)]),
        }

    def model_timestep(self, timesteps: Tensor) -> Tensor:
        """Scale [0, 1000] to [0, 1]."""
        return timesteps / 1000

    def guide(self, predictions: Mapping[str, Parts], latents: Parts, step: Step, sampling: Sampling) -> Parts:
        """Classifier-free guidance with `guidance_scale`."""
        del latents, step
        return {"image": classifier_free(predictions, "image", sampling.guidance_scale or 0.0)}

    def vae_latents(self, raw: Tensor) -> Tensor:
        """Unchanged: the VAE denormalizes with statistics in its weights."""
        return raw

    def _tokens(self, canvas: Canvas) -> int:
        rows, columns = self.raw_latent_shapes(canvas, 1)["image"][2:]
        return rows * columns


@dataclass(frozen=True, kw_only=True)
class Flux2ReferencesConfig(Flux2FamilyConfig, ImageLatentsConfig):
    """Adds reference images of any size, whose tokens are concatenated after the noise tokens."""

    def image_size(self, size: tuple[int, int], canvas: Canvas) -> tuple[int, int]:
        """The image's size, reduced to the VAE's maximum area."""
        del canvas
        return area_limited(*size)

    def image_crop(self, size: tuple[int, int]) -> tuple[int, int]:
        """Crop to whole patches."""
        side = self.pixels_per_patch
        return size[0] // side * side, size[1] // side * side

    def image_latents(self, encode: Callable[[Tensor], Tensor], images: Mapping[str, Tensor], canvas: Canvas) -> Parts:
        """Normalized patches of each image, (1, 4C, h, w)."""
        del canvas
        return {condition_name(index): encode(image) for index, image in enumerate(images.values())}

    def condition_shapes(self, canvas: Canvas) -> Shapes:
        """One reference image in the size of the generated image."""
        height, width = self.image_crop(area_limited(canvas.height, canvas.width))
        side = self.pixels_per_patch
        return {CONDITION: (1, self.transformer.in_channels, height // side, width // side)}

    def model_input(self, latents: Parts, conditions: Parts) -> Parts:
        """Concatenate the tokens of the generated image and of the reference images."""
        given = [conditions[part] for part in condition_parts(conditions)]
        return {"image": torch.cat([latents["image"], *given], dim=1)}

    def model_output(self, predictions: Parts, latents: Parts) -> Parts:
        """Drop the tokens of the reference images."""
        return {"image": predictions["image"][:, : latents["image"].shape[1]]}


def _positions(index: int, rows: int, columns: int) -> Tensor:
    """Positions (rows * columns, 4) of an image's tokens; index 0 is the generated image."""
    time = torch.tensor([float(REFERENCE_IMAGE_DISTANCE * index)])
    axes = (torch.arange(size, dtype=torch.float32) for size in (rows, columns, 1))
    return torch.cartesian_prod(time, *axes)
