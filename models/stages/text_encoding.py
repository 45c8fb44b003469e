"""Encodes prompts to conditioning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.artifacts import Conditioning, Prompt
from common.stage import Call, PipelineStage
from configs.pipeline_configs.base import TextConfig
from models.contracts import TextEncodingInput, TextEncodingOutput
from models.encoder_runners.callbacks import Warn
from models.encoder_runners.text import TextEncoder
from models.runtime import Runtime


class TextEncodingStage(PipelineStage[TextEncodingInput, TextEncodingOutput]):
    """Runs the model's text encoders on the prompt and, if guidance requires it, on the negative prompt."""

    indifferent_to = frozenset({"sampling.seed", "sampling.num_inference_steps"})

    def __init__(self, config: TextConfig, runtime: Runtime, modules: Mapping[str, Any]) -> None:
        self._config = config
        self._dtype = runtime.dtype
        self._encoders = [TextEncoder(encoding, modules, runtime.device) for encoding in config.text_encodings]

    @torch.inference_mode()
    def run(self, x: TextEncodingInput, call: Call) -> TextEncodingOutput:
        """Conditioning of batch 1 on the CPU; the denoising stage repeats it for each output."""
        prompt_embeds = self._encode(x.prompt, call.warn)
        negative_prompt_embeds: dict[str, Tensor] = {}
        if self._config.wants_negative(x.prompt, x.sampling):
            call.check_cancelled()
            negative_prompt_embeds = self._encode(
                Prompt(
                    prompt=x.prompt.negative_prompt or "",
                    prompt_2=x.prompt.negative_prompt_2,
                    max_sequence_length=x.prompt.max_sequence_length,
                ),
                lambda field, message: call.warn(f"negative_{field}", message),
            )
        conditioning = Conditioning(prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds)
        return TextEncodingOutput(text_conditioning=conditioning)

    def _encode(self, prompt: Prompt, warn: Warn) -> dict[str, Tensor]:
        encoded = [encoder.encode(prompt, warn) for encoder in self._encoders]
        return {keyword: each.to("cpu", self._dtype) for made in encoded for keyword, each in made.items()}
