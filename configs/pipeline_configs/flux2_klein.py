"""FLUX.2 klein: packed latents, three layers' states of a language model, guidance unless the model is distilled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from common.errors import CheckpointError
from configs.models.dits.flux2 import Flux2TransformerConfig
from configs.models.encodings import PromptText, TextEncoding, sequence_length
from configs.models.fields import ConfigFields
from configs.models.vaes.flux2 import AutoencoderKLFlux2Config
from configs.pipeline_configs.base import (
    NEGATIVE,
    POSITIVE,
    Keywords,
    Parts,
    Shapes,
    StandardPipelineConfig,
    Step,
)
from configs.pipeline_configs.packed import check_text_size

if TYPE_CHECKING:
    from common.artifacts import Canvas, Prompt, Sampling
    from common.checkpoint import Checkpoint

MAX_SEQUENCE_LENGTH = 512
PATCH = 2
TEXT_LAYERS = (9, 18, 27)
"""Layers of the language model whose states are concatenated."""
BEFORE, AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""The chat text around a prompt, as the published tokenizer renders it with enable_thinking=False."""

MOST_TOKENS_SHIFTED_BY_STEPS = 4300
"""For images of more tokens the shift does not depend on the number of steps."""


@dataclass(frozen=True, kw_only=True)
class Flux2KleinPipelineConfig(StandardPipelineConfig):
    """Flux2KleinPipeline's callbacks. A token is a 2x2 patch of latents, channels in the order (c, dy, dx)."""

    title: ClassVar[str] = "FLUX.2 klein, distilled or not"
    deviations: ClassVar[str] = (
        "Text to image only: no stage encodes reference images. `negative_prompt` is dropped, as Diffusers has none."
    )

    transformer: Flux2TransformerConfig
    vae: AutoencoderKLFlux2Config
    is_distilled: bool

    module_loaders: ClassVar[Mapping[str, str]] = {
        "AutoencoderKLFlux2": "models.vaes.flux2:load_flux2_vae",
        "Flux2Transformer2DModel": "models.dits.flux2:load_flux2_transformer",
        "Qwen3ForCausalLM": "models.encoder_runners.language_model:load_causal_language_model",
    }
    parallel_modules: ClassVar[frozenset[str]] = frozenset({"Flux2Transformer2DModel"})
    part_keywords: ClassVar[Mapping[str, str]] = {"image": "hidden_states"}
    visual_part: ClassVar[str] = "image"

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """Read transformer, VAE and text encoder. Raises CheckpointError when they do not fit together."""
        transformer = Flux2TransformerConfig.from_dict("transformer", checkpoint.module_config("transformer"))
        vae = AutoencoderKLFlux2Config.from_dict("vae", checkpoint.module_config("vae"))
        if not transformer.in_channels == transformer.out_channels == PATCH**2 * vae.latent_channels:
            raise CheckpointError(
                f"the transformer has {transformer.in_channels} input and {transformer.out_channels} output channels, "
                f"but 2x2 patches of the VAE's {vae.latent_channels} latent channels have {4 * vae.latent_channels}"
            )
        if transformer.guidance_embeds:
            raise CheckpointError("transformer/config.json: guidance_embeds True is not supported; supported is False")
        text = ConfigFields("text_encoder", checkpoint.module_config("text_encoder"))
        text.integer("num_hidden_layers", 32, minimum=TEXT_LAYERS[-1])
        made = len(TEXT_LAYERS) * text.integer("hidden_size", 4096)
        check_text_size(made, "text_encoder", transformer.joint_attention_dim)
        is_distilled = ConfigFields("model_index", checkpoint.index).flag("is_distilled", False)
        return cls(transformer=transformer, vae=vae, is_distilled=is_distilled)

    @property
    def text_encodings(self) -> tuple[TextEncoding, ...]:
        """The language model's states of TEXT_LAYERS. The denoiser attends to padding, as in training."""
        qwen = TextEncoding(
            keyword="encoder_hidden_states",
            tokenizer="tokenizer",
            encoder="text_encoder",
            text=_chat,
            max_length=sequence_length(MAX_SEQUENCE_LENGTH),
            output=_states,
            masked=True,
            padding_side="right",
        )
        return (qwen,)

    def wants_negative(self, prompt: Prompt, sampling: Sampling) -> bool:
        """Guidance needs a scale above 1, and a model that is not distilled."""
        del prompt
        return not self.is_distilled and (sampling.guidance_scale or 0.0) > 1.0

    def conditioning_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Text is padded to 512 tokens, unless a request sets another length."""
        return {"encoder_hidden_states": (1, MAX_SEQUENCE_LENGTH, self.transformer.joint_attention_dim)}

    def raw_latent_shapes(self, canvas: Canvas, batch: int) -> Shapes:
        """(batch, channels of a patch, rows, columns) of patches."""
        side = PATCH * self.vae.spatial_factor
        return {"image": (batch, self.transformer.in_channels, canvas.height // side, canvas.width // side)}

    def pack(self, part: str, raw: Tensor) -> Tensor:
        """(B, 4C, h, w) to (B, h*w, 4C)."""
        del part
        return raw.flatten(2).transpose(1, 2)

    def unpack(self, part: str, latents: Tensor, raw_latent_shape: tuple[int, ...]) -> Tensor:
        """(B, h*w, 4C) to (B, 4C, h, w)."""
        del part
        return latents.transpose(1, 2).reshape(latents.shape[0], *raw_latent_shape[1:])

    def sigmas(self, sampling: Sampling) -> Sequence[float]:
        """The request's own, or evenly spaced from 1 to 1/steps."""
        steps = sampling.num_inference_steps
        return sampling.sigmas or np.linspace(1.0, 1.0 / steps, steps).tolist()

    def mu(self, canvas: Canvas) -> float:
        """Of 200 steps, which is also that of any number of steps for a large image."""
        return 0.00016927 * self._tokens(canvas) + 0.45666666

    def mu_of_steps(self, canvas: Canvas, sampling: Sampling) -> float:
        """Linear in the number of steps, or in shift_steps with sigmas, through the shifts of 10 and of 200 steps."""
        tokens, of_200_steps = self._tokens(canvas), self.mu(canvas)
        if tokens > MOST_TOKENS_SHIFTED_BY_STEPS:
            return of_200_steps
        of_10_steps = 8.73809524e-05 * tokens + 1.89833333
        slope = (of_200_steps - of_10_steps) / 190.0
        steps = sampling.params.get("shift_steps", sampling.num_inference_steps)
        assert isinstance(steps, int)
        return slope * steps + of_200_steps - 200.0 * slope

    def prepare_pos_cond_kwargs(self, embeds: Parts, shapes: Shapes, sampling: Sampling) -> Keywords:
        """Positions (image, row, column, text token). There is no guidance embedding."""
        del sampling
        rows, columns = shapes["image"][2:]
        text = torch.arange(embeds["encoder_hidden_states"].shape[1], dtype=torch.float32)
        axes = (torch.arange(size, dtype=torch.float32) for size in (1, rows, columns, 1))
        return {
            "guidance": None,
            "txt_ids": torch.nn.functional.pad(text[:, None], (3, 0)),
            "img_ids": torch.cartesian_prod(*axes),
        }

    def model_timestep(self, timesteps: Tensor) -> Tensor:
        """From [0, 1000] to [0, 1]."""
        return timesteps / 1000

    def guide(self, predictions: Mapping[str, Parts], latents: Parts, step: Step, sampling: Sampling) -> Parts:
        """Classifier-free guidance."""
        del latents, step
        positive, negative = predictions[POSITIVE]["image"], predictions[NEGATIVE]["image"]
        return {"image": negative + (sampling.guidance_scale or 0.0) * (positive - negative)}

    def saved_latents(self, part: str, latents: Tensor, raw_latent_shape: tuple[int, ...], decoder: Any) -> Tensor:
        """Without the normalisation and the patches."""
        raw: Tensor = decoder.denormalised(self.unpack(part, latents, raw_latent_shape))
        return raw

    def vae_latents(self, raw: Tensor) -> Tensor:
        """Unchanged: the statistics of the normalisation are the VAE's weights."""
        return raw

    def _tokens(self, canvas: Canvas) -> int:
        rows, columns = self.raw_latent_shapes(canvas, 1)["image"][2:]
        return rows * columns


def _chat(prompt: Prompt) -> PromptText:
    return PromptText(field="prompt", text=f"{BEFORE}{prompt.prompt}{AFTER}")


def _states(output: Any, _: Tensor) -> Tensor:
    return torch.cat([output.hidden_states[layer] for layer in TEXT_LAYERS], dim=-1)
