"""Z-Image: a language model with a prompt template; guidance can end before the last step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from common.errors import CheckpointError
from configs.models.dits.z_image import PATCH, ZImageTransformerConfig
from configs.models.encodings import Template, TextEncoding, hidden_states, sequence_length, whole_prompt
from configs.models.fields import ConfigFields
from configs.models.vaes.kl import AutoencoderKLConfig
from configs.pipeline_configs.base import (
    NEGATIVE,
    POSITIVE,
    Keywords,
    Parts,
    Shapes,
    StandardPipelineConfig,
    Step,
)
from configs.pipeline_configs.packed import SequenceShift, check_text_size

if TYPE_CHECKING:
    from common.artifacts import Canvas, Prompt, Sampling
    from common.checkpoint import Checkpoint

MAX_SEQUENCE_LENGTH = 512
TYPICAL_TOKENS = 64
"""Number of tokens of a typical prompt, for warm-up. Text is padded only to a multiple of SEGMENT."""
SEGMENT = 32
"""Numbers of text and image tokens are padded to multiples of SEGMENT."""

TEMPLATE = Template(before="<|im_start|>user\n", after="<|im_end|>\n<|im_start|>assistant\n", skipped=0)


@dataclass(frozen=True, kw_only=True)
class ZImagePipelineConfig(StandardPipelineConfig):
    """ZImagePipeline's callbacks.

    Latents (B, channels, rows, columns) are float32 and not packed; a token is a 2x2 patch.
    """

    title: ClassVar[str] = "Z-Image and Z-Image-Turbo"
    deviations: ClassVar[str] = (
        "`cfg_normalization` is a number and `cfg_truncation` is never null, as a parameter has one type. The "
        "chat template is fixed; that of the tokenizer is not executed."
    )

    transformer: ZImageTransformerConfig
    vae: AutoencoderKLConfig
    shift: SequenceShift

    module_loaders: ClassVar[Mapping[str, str]] = {
        "Qwen3Model": "models.encoder_runners.language_model:load_language_model",
        "Qwen3ForCausalLM": "models.encoder_runners.language_model:load_causal_language_model",
        "ZImageTransformer2DModel": "models.dits.z_image_plan:load_z_image_transformer",
    }
    parallel_modules: ClassVar[frozenset[str]] = frozenset({"ZImageTransformer2DModel"})
    part_keywords: ClassVar[Mapping[str, str]] = {"image": "hidden_states"}
    visual_part: ClassVar[str] = "image"
    has_float32_noise: ClassVar[bool] = True
    prediction_dtype: ClassVar[torch.dtype | None] = torch.float32

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Parse the modules' config.json. Raises CheckpointError for incompatible modules."""
        transformer = ZImageTransformerConfig.from_dict("transformer", checkpoint.module_config("transformer"))
        vae = AutoencoderKLConfig.from_dict("vae", checkpoint.module_config("vae"))
        if transformer.in_channels != vae.latent_channels:
            raise CheckpointError(
                f"transformer/config.json: in_channels: {transformer.in_channels} is not {vae.latent_channels}, the "
                f"VAE's latent channels"
            )
        text = ConfigFields("text_encoder", checkpoint.module_config("text_encoder"))
        check_text_size(text.integer("hidden_size", 4096), "text_encoder", transformer.text_size)
        shift = SequenceShift.from_dict("scheduler", checkpoint.config_of("scheduler"))
        return cls(transformer=transformer, vae=vae, shift=shift)

    @property
    def text_encodings(self) -> tuple[TextEncoding, ...]:
        """Hidden states of the second-to-last layer, including the template, without padding."""
        qwen = TextEncoding(
            keyword="encoder_hidden_states",
            tokenizer="tokenizer",
            encoder="text_encoder",
            text=whole_prompt,
            max_length=sequence_length(MAX_SEQUENCE_LENGTH),
            output=hidden_states(-2),
            template=TEMPLATE,
        )
        return (qwen,)

    def wants_negative(self, prompt: Prompt, sampling: Sampling) -> bool:
        """Whether guidance is enabled: a scale above 0."""
        del prompt
        return (sampling.guidance_scale or 0.0) > 0.0

    def raw_latent_shapes(self, canvas: Canvas, batch: int) -> Shapes:
        """(batch, channels, rows, columns)."""
        factor = self.vae.spatial_factor
        return {"image": (batch, self.vae.latent_channels, canvas.height // factor, canvas.width // factor)}

    def sigmas(self, sampling: Sampling) -> Sequence[float]:
        """The request's sigmas, or evenly spaced from 1 to 1/steps."""
        steps = sampling.num_inference_steps
        return sampling.sigmas or torch.linspace(1.0, 1.0 / steps, steps).tolist()

    def mu(self, canvas: Canvas) -> float:
        """The shift from the number of image tokens; a scheduler without dynamic shifting ignores it."""
        side = PATCH * self.vae.spatial_factor
        return self.shift.mu((canvas.height // side) * (canvas.width // side))

    def conditioning_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape for a typical prompt."""
        return {"encoder_hidden_states": (1, TYPICAL_TOKENS, self.transformer.text_size)}

    def prepare_pos_cond_kwargs(self, embeds: Parts, shapes: Shapes, sampling: Sampling) -> Keywords:
        """Positions (sequence, row, column): text from 1, then the image; image padding is at 0."""
        del sampling
        text = _padded(embeds["encoder_hidden_states"].shape[1])
        rows, columns = (side // PATCH for side in shapes["image"][2:])
        tokens = rows * columns
        image_ids = torch.zeros(_padded(tokens), 3)
        axes = (torch.tensor([text + 1.0]), torch.arange(rows).float(), torch.arange(columns).float())
        image_ids[:tokens] = torch.cartesian_prod(*axes)
        text_ids = torch.zeros(text, 3)
        text_ids[:, 0] = torch.arange(text) + 1
        return {"text_ids": text_ids, "image_ids": image_ids}

    def model_timestep(self, timesteps: Tensor) -> Tensor:
        """Map [1000, 0] to [0, 1]."""
        return (1000 - timesteps) / 1000

    def active(self, step: Step, branches: Sequence[str], sampling: Sampling) -> Sequence[str]:
        """Drop the negative branch once the normalized time, from 0 (noise) to 1, exceeds cfg_truncation.

        Computed in float32, as in Diffusers.
        """
        done = float((np.float32(1000) - np.float32(step.timestep)) / np.float32(1000))
        return (POSITIVE,) if done > _number(sampling, "cfg_truncation", math.inf) else branches

    def model_output(self, predictions: Parts, latents: Parts) -> Parts:
        """Negate the predictions: the scheduler expects the velocity towards noise."""
        del latents
        return {part: -each for part, each in predictions.items()}

    def guide(self, predictions: Mapping[str, Parts], latents: Parts, step: Step, sampling: Sampling) -> Parts:
        """Classifier-free guidance.

        A cfg_normalization above 0 limits the norm to cfg_normalization times the positive prediction's norm.
        """
        del latents, step
        positive, negative = predictions[POSITIVE]["image"], predictions[NEGATIVE]["image"]
        guided = positive + (sampling.guidance_scale or 0.0) * (positive - negative)
        normalization = _number(sampling, "cfg_normalization", 0.0)
        if normalization > 0:
            axes = tuple(range(1, guided.ndim))
            base, norm = (torch.linalg.vector_norm(each, dim=axes, keepdim=True) for each in (positive, guided))
            limit = base * normalization
            guided = torch.where(norm > limit, guided * (limit / norm), guided)
        return {"image": guided}

    def vae_latents(self, raw: Tensor) -> Tensor:
        """Undo the scaling, then undo the shift."""
        return raw / self.vae.scaling_factor + self.vae.shift_factor


def _padded(tokens: int) -> int:
    return -(-tokens // SEGMENT) * SEGMENT


def _number(sampling: Sampling, name: str, default: float) -> float:
    value = sampling.params.get(name, default)
    assert isinstance(value, int | float), f"{name} is a number"
    return float(value)
