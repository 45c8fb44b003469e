"""FLUX.2 dev: hidden states of Mistral Small 3, and embedded guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from configs.models.encodings import PromptText, TextEncoding
from configs.pipeline_configs.base import POSITIVE
from configs.pipeline_configs.flux2 import Flux2FamilyConfig, Flux2ReferencesConfig

if TYPE_CHECKING:
    from common.artifacts import Prompt, Sampling

# The line break is part of the training data.
SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
BEFORE, AFTER = f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]", "[/INST]"
"""Chat template text around a prompt, as rendered by the published tokenizer."""
IMAGE_TOKEN = "[IMG]"
"""Image token of the language model; removed from prompts, as the language model reads only text."""


@dataclass(frozen=True, kw_only=True)
class Flux2PipelineConfig(Flux2FamilyConfig):
    """Flux2Pipeline's callbacks for text input."""

    title: ClassVar[str] = "FLUX.2 dev"
    deviations: ClassVar[str] = (
        "Prompts are not rewritten by the language model (`caption_upsample_temperature`), as Diffusers samples "
        "without a seed. At most 16 images and 512 tokens, to bound memory."
    )

    module_loaders: ClassVar[Mapping[str, str]] = {
        **Flux2FamilyConfig.module_loaders,
        "Mistral3ForConditionalGeneration": "models.encoder_runners.language_model:load_multimodal_language_model",
        "PixtralProcessor": "models.loader:load_auto_tokenizer",
    }
    guidance_embeds: ClassVar[bool] = True
    text_layers: ClassVar[tuple[int, ...]] = (10, 20, 30)
    branches: ClassVar[tuple[str, ...]] = (POSITIVE,)

    def chat(self, prompt: Prompt) -> PromptText:
        """The system message and the prompt as user message."""
        return PromptText(field="prompt", text=f"{BEFORE}{prompt.prompt.replace(IMAGE_TOKEN, '')}{AFTER}")

    @property
    def text_encoding(self) -> TextEncoding:
        """Padded on the left, the tokenizer's default; the chat text contains the special tokens."""
        return replace(super().text_encoding, has_special_tokens=True)

    def wants_negative(self, prompt: Prompt, sampling: Sampling) -> bool:
        """False: guidance is embedded."""
        del prompt, sampling
        return False


@dataclass(frozen=True, kw_only=True)
class Flux2ImagePipelineConfig(Flux2PipelineConfig, Flux2ReferencesConfig):
    """Flux2Pipeline's callbacks for text and reference images."""
