"""FLUX.2 klein: hidden states of Qwen3, and classifier-free guidance unless the model is distilled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from configs.models.encodings import PromptText, TextEncoding
from configs.models.fields import ConfigFields
from configs.pipeline_configs.flux2 import Flux2FamilyConfig, Flux2ReferencesConfig

if TYPE_CHECKING:
    from common.artifacts import Prompt, Sampling
    from common.checkpoint import Checkpoint

BEFORE, AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""Chat template text around a prompt, as rendered by the tokenizer with enable_thinking=False."""


@dataclass(frozen=True, kw_only=True)
class Flux2KleinPipelineConfig(Flux2FamilyConfig):
    """Flux2KleinPipeline's callbacks for text input."""

    title: ClassVar[str] = "FLUX.2 klein, distilled or not"
    deviations: ClassVar[str] = (
        "`negative_prompt` is dropped, as Diffusers has none. At most 16 images and 512 tokens, to bound memory."
    )

    is_distilled: bool

    module_loaders: ClassVar[Mapping[str, str]] = {
        **Flux2FamilyConfig.module_loaders,
        "Qwen3ForCausalLM": "models.encoder_runners.language_model:load_causal_language_model",
    }
    guidance_embeds: ClassVar[bool] = False
    text_layers: ClassVar[tuple[int, ...]] = (9, 18, 27)

    @classmethod
    def _further_fields(cls, checkpoint: Checkpoint) -> dict[str, Any]:
        return {"is_distilled": ConfigFields("model_index", checkpoint.index).flag("is_distilled", False)}

    def chat(self, prompt: Prompt) -> PromptText:
        """The prompt as user message."""
        return PromptText(field="prompt", text=f"{BEFORE}{prompt.prompt}{AFTER}")

    @property
    def text_encoding(self) -> TextEncoding:
        """Padded on the right."""
        return replace(super().text_encoding, padding_side="right")

    def wants_negative(self, prompt: Prompt, sampling: Sampling) -> bool:
        """Whether guidance is enabled: a scale above 1, and a model that is not distilled."""
        del prompt
        return not self.is_distilled and (sampling.guidance_scale or 0.0) > 1.0

    def saved_latents(self, part: str, latents: Tensor, raw_latent_shape: tuple[int, ...], decoder: Any) -> Tensor:
        """Denormalized latents, without patches."""
        raw: Tensor = decoder.denormalized(self.unpack(part, latents, raw_latent_shape))
        return raw


@dataclass(frozen=True, kw_only=True)
class Flux2KleinImagePipelineConfig(Flux2KleinPipelineConfig, Flux2ReferencesConfig):
    """Flux2KleinPipeline's callbacks for text and reference images."""
