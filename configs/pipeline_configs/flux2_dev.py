"""FLUX.2 dev: states of Mistral Small 3, and embedded guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from configs.models.encodings import PromptText, TextEncoding
from configs.pipeline_configs.base import POSITIVE
from configs.pipeline_configs.flux2 import Flux2FamilyConfig, Flux2ReferencesConfig

if TYPE_CHECKING:
    from common.artifacts import Prompt, Sampling

# With the line break that the model was trained with.
SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
BEFORE, AFTER = f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]", "[/INST]"
"""The chat text around a prompt, as the published tokenizer renders it."""
IMAGE_MARK = "[IMG]"
"""The language model's token of an image. It reads text alone, so the mark is removed from prompts."""


@dataclass(frozen=True, kw_only=True)
class Flux2PipelineConfig(Flux2FamilyConfig):
    """Flux2Pipeline's callbacks, from text alone."""

    title: ClassVar[str] = "FLUX.2 dev"
    deviations: ClassVar[str] = (
        "Prompts are not rewritten by the language model (`caption_upsample_temperature`), as that draws from a "
        "generator without a seed. At most 16 images and 512 tokens, which bounds memory."
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
        """The system message and a turn of the user."""
        return PromptText(field="prompt", text=f"{BEFORE}{prompt.prompt.replace(IMAGE_MARK, '')}{AFTER}")

    @property
    def text_encoding(self) -> TextEncoding:
        """Padded on the tokenizer's side, which is the left; the chat text has the mark of the beginning."""
        return replace(super().text_encoding, has_marks=True)

    def wants_negative(self, prompt: Prompt, sampling: Sampling) -> bool:
        """Never: guidance is embedded."""
        del prompt, sampling
        return False


@dataclass(frozen=True, kw_only=True)
class Flux2ImagePipelineConfig(Flux2PipelineConfig, Flux2ReferencesConfig):
    """Flux2Pipeline's callbacks, from text and reference images."""
